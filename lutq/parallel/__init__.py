"""One model over several processes, a GPU each: `torchrun --nproc-per-node N -m lutq generate ...`, eval-ppl and bench decode.

    job.py    processes of one torchrun: output, errors, and the end of all when one ends (watch.py)
    ranks.py  who this process is among them, and what all compute together
    inboxes.py  memory of every GPU that the others write to, for sums inside kernels
    split.py  which part of each Linear layer is whose
    load.py   that part, and nothing else of the layer, read from a checkpoint of any N
    score.py  logits of whole windows, for eval-ppl

q, k, v, gate and up are cut by outputs (whole heads), o and down by inputs, the head by vocabulary; embeddings and norms are
everyone's. So a block takes two sums over the ranks, of y [M, hidden], and at the end logits are gathered, all by the fast engine
(lutq/decode/engine.py), on a GPU inside the captured step. There the norm that follows makes the sum, in fp32, over memory that
the GPUs write to directly. Prompts, logits and GPUs that do not reach each other go through NCCL, CPUs through gloo: each rank
rounds its y to the model's dtype, and sums are made in it. Logits are those of one process within that rounding. All ranks have
the same bits of them and choose the same token. Where tokens are drawn, rank 0 sends its own to the others, so that nothing can
part them.
"""
