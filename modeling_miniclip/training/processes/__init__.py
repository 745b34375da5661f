"""Several processes and machines.

distributed.py: gather embeddings with their gradients, add up numbers
deepspeed.py: training with ZeRO of DeepSpeed
connections.py: between the processes of a run, for the heartbeat
heartbeat.py: notice a lost process or machine, and end the others
"""
