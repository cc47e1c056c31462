"""Multi-host jobs: hostfiles, launch commands, host checks (`preflight`) and supervision with restarts (`supervise`).

Text, sockets and processes only: no tensors.
"""
