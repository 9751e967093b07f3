"""One model over several processes, a GPU each: `torchrun --nproc-per-node N -m lutq generate ...`, eval-ppl and bench decode.

    job.py    processes of one torchrun: output, errors, and the end of all when one ends (watch.py)
    ranks.py  who this process is among them, and sums over all
    split.py  which part of each Linear layer is whose
    load.py   that part, and nothing else of the layer, read from a checkpoint of any N
    score.py  logits of whole windows, for eval-ppl

q, k, v, gate and up are cut by outputs (whole heads), o and down by inputs; embeddings, norms and head are everyone's. So a block
takes two sums over the ranks, of y [M, hidden], which the fast engine makes where it calls `reduce` (lutq/decode/engine.py), on a
GPU inside the captured step. Each rank rounds its y to the model's dtype, and sums are made in it (NCCL on GPUs, gloo on CPUs):
logits are those of one process within that rounding. Rank 0 chooses the tokens and sends them to the others, in the same step,
so that no difference of rounding between GPUs can part them.
"""
