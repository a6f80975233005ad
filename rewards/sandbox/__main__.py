"""`python -m rewards.sandbox [strong | weak]`: which layers are in force on this machine, or why it refuses (exit code 2)."""

from __future__ import annotations

import sys

from rewards.sandbox import SandboxError, layers, run_script


def main(arguments: list[str]) -> int:
    mode = arguments[0] if arguments else "strong"
    try:
        found = layers(mode)
    except (SandboxError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, text in found.items():
        print(f"{name:12} {text}")
    outcome = run_script("import os; print(*sorted(os.listdir('/')), 'as user', os.getuid())", mode=mode)
    print(f"{'inside':12} {(outcome.stdout + outcome.stderr).decode().strip()} ({1000 * outcome.seconds:.0f} ms)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
