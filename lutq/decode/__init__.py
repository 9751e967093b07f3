"""Decoding: one token per sequence and step, at the speed at which the weights can be read.

`lutq generate` takes one of three engines (choose.py):

    fast    engine.py: the model of OPT and LLaMA written out over few kernels (steps.py, kernels/step.cuh), the weights of
            q, k and v, and of gate and up, joined without a copy (products.py, weights.py), the prompt in chunks (prefill.py)
    graph   general.py: the model's own forward over a static cache, for every causal model of transformers that allows it
    plain   transformers' `generate`

Of the first two a step is one CUDA graph (graph.py): it reads the last token and its position from the GPU's memory, chooses the
next one there (sampler.py) and puts it where the next step reads it. The host reads tokens one step behind (loop.py). On the CPU
the same code runs uncaptured, with reference.py in place of the kernels. From Python the engine stays with the model for the next
text (keep.py). synthetic.py and bench.py are `lutq bench decode`.
"""
