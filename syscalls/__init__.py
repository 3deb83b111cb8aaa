"""Syscalls: typed requests an agent makes of the kernel, one module per family."""
