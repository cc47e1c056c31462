"""What a rank shares with the job it is part of: its folder, its heartbeat and the wire format, without torch."""
