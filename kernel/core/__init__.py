"""The pure core: all decisions of the kernel.

An event comes in, a list of actions comes out. Nothing in here knows Ray, torch,
asyncio, a clock or chance; time comes with the event. The live kernel, the unit tests
and (later) the simulator drive the same classes.
"""
