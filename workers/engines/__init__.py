"""Rollout engines. A module here has a class `Engine(model, device, max_rows)` with

generate(requests, settings: SamplerConfig, noise, version) -> list[Rollout], one per request in their order
weights_changed()       the model's weights were written to, in place

`torch_engine` runs everywhere; `vllm_engine` needs vLLM (docs/vllm.md) and gives the same rollouts.
"""
