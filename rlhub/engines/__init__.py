"""Rollout engines. A module here has a class `Engine(model, device, max_rows)` with

generate(requests, settings: SamplerConfig, noise, version, on_step) -> list[Rollout], one per request in their order
weights_changed(version)    the model's weights were written to, in place; also between two steps of `generate`

`torch_engine` runs everywhere; `vllm_engine` needs vLLM (docs/vllm.md) and gives the same rollouts.
"""
