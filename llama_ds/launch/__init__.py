"""Jobs on hosts: hostfiles, where ranks go, how they are started, what hosts are like, and seeing jobs through.

Text, sockets and processes only: no tensors. `preflight` looks at hosts, `supervise` watches, ends and restarts jobs.
"""
