"""Whether N ranks train exactly as one process does, on a user's own configuration: what `verify-parallel` runs.

1. `job` lists what is compared: layouts, anchor sets, controls. Pure functions of the configuration.
2. `reference`, in one process, takes a few steps on the joined batches by plain autograd and leaves the weights.
3. `ranks`, in N processes an engine, takes the same steps through the engine and compares.
4. `verdict` judges the numbers of both.
`processes` starts and ends 2 and 3; what they know of each other lies in one folder, as JSON and safetensors.
"""
