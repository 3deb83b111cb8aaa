"""What a policy would do with a load, without a model: a discrete-event simulation.

It drives the policy classes of :mod:`llmos.kernel.core.policies`, as they are, with recorded
or made-up traces, and takes the time of a step from the engine's own model
(:class:`llmos.drivers.protocols.StepTime`). ``python -m llmos.kernel.simulation --help``.
"""
