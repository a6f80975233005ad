"""Model families, one file each, found by the `architectures` of a checkpoint's config.json.

A family module has `ARCHITECTURES`, a frozen dataclass `Config` with `from_published(dict)` and `to_published()`, `TINY` (the fields of a
small config, for tests and examples), and `build(config) -> nn.Module` with

    denoise(tokens int [T], layout, targets=None, cache=None)
        targets None: hidden [T, D] of the packed rows; entry p predicts the token at position p.
        targets int [M]: hidden [M, D] that predict the tokens at these packed positions, in their order. The last layer's queries and MLP
            are computed for them alone. Equal to the rows of the above up to rounding, with gradient as well.
        cache: a `CacheView`. The keys and values of the tokens are stored at their position ids in the row's slot, then every token
            attends to all that the slot holds (block-causal families: to blocks up to its own). Without gradient only.
    head(hidden [T, D], target_rows int [M]) -> logits [M, V]       or head(hidden [M, D]) -> logits [M, V]
    new_cache(num_slots, max_length) -> KeyValueCache
    initialize(generator)                                           random weights
    profile                                                         `Profile`, all that others need to know of a family
    attention                                                       backend: sdpa, flex or flash
    config, mask_id, eos_id, vocab_size, max_length

The family applies its own logit shift and cuts the padding rows of its vocabulary; nobody else knows of them. A family with a logit
shift predicts the token at position p from the hidden state at p - 1, so under a cache the tokens of a call must include p - 1.

Names of modules are those of the published tensors, so most families need nothing for reading and writing files. Where they differ

    places(config) -> {published name: (name of ours, index)}
        which part `tensor[index]` of our parameter or buffer one published tensor fills, () for all of it: the experts of a stacked
        weight, or the rows of a fused projection. Files are read and written tensor by tensor through it, in both directions.
    UNUSED                                                          regular expression of published tensors that are not read

Parameters take the dtype that is asked for; a buffer keeps the one it is registered with. Buffers outside the state (non-persistent)
are refused. Linear layers that `lora_targets` matches are called, never read for their weight: an adapter may lie around them.

`rlhub.networks` holds what families are built of; `rlhub.networks.decoder` is the stack that most of them share.
"""

CONTRACT = ("Config", "build(config)", "ARCHITECTURES")
