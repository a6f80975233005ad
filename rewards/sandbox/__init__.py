"""Runs programs that a model wrote, so that nothing they do reaches the grader, the machine or the verdict.

    python -m rewards.sandbox [strong | weak]      which layers are in force on this machine

`strong` is new user, pid, mount, network, ipc and uts namespaces, a read-only root with the interpreter only, no capabilities, a seccomp
filter, resource limits, and a memory and process cgroup where one can be had. Where a layer other than the cgroup is missing it refuses.
`weak` is resource limits and a process group: enough against accidents, not against intent. THREATS.md says what a program may try,
what holds it and what does not; docs/sandbox.md what a machine must offer.

`inside` is what runs in the sandbox: standard library only, since a fresh interpreter imports it outside of any package.
"""

from rewards.sandbox.client import layers, run_script, run_tests
from rewards.sandbox.programs import MODES, Limits, Outcome, SandboxError, SandboxUnavailable, Verdict
from rewards.sandbox.servers import close

__all__ = [
    "MODES",
    "Limits",
    "Outcome",
    "SandboxError",
    "SandboxUnavailable",
    "Verdict",
    "close",
    "layers",
    "run_script",
    "run_tests",
]
