"""Devices: the CPU and CUDA GPUs with their memory budgets."""
