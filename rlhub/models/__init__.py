"""Model families, one file each, found by the `architectures` of a checkpoint's config.json.

A family module has `ARCHITECTURES`, a frozen dataclass `Config` with `from_published(dict)` and `to_published()`, and
`build(config) -> nn.Module` with

    denoise(tokens: int [T], layout: Layout) -> [T, D]      hidden states of packed rows
    head(hidden: [T, D], target_rows: int [M]) -> [M, V]    logits that predict the tokens at those positions
    initialize(generator)                                   random weights
    mask_id, eos_id, vocab_size, max_length

The family applies its own logit shift and cuts the padding rows of its vocabulary; nobody else knows of them. `layers` is shared.
"""
