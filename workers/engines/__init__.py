"""Rollout engines. A module here has a class `Engine(model, device, max_rows)` with

generate(requests, settings: SamplerConfig, noise, version) -> list[Rollout], one per request in their order
"""
