"""The sandbox: what is in force, and that no hostile program gets through. Each is first shown to do its harm without it."""

import errno
import os
import random
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hostile_programs import HOSTILE, Forgery, Hostile
from sandbox_makers import BUBBLEWRAP, MADE_BY, maker  # noqa: F401

from rewards import code_tests, load_grader
from rewards.sandbox import MODES, Limits, close, layers, run_script
from rewards.sandbox.inside.kernel import ARCHITECTURES
from rewards.sandbox.inside.privileges import CLONE, CLONE3, FORBIDDEN, LAST_KNOWN, filter_code
from rewards.sandbox.servers import server

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 1.0
SECRET = "hunter2"
ESCAPES = {"tests": [{"input": "", "output": "ESCAPED"}]}  # a program "passes" when it escapes
GOOD = {"tests": [{"input": "20 22", "output": "42"}]}
GOOD_PROGRAM = "print(sum(map(int, input().split())))"
PYTHON = [sys.executable, "-S"]


class World:
    """A throw-away folder with things to steal and to break."""

    def __init__(self, folder: Path, listening: tuple[int, str], needs_victim: bool) -> None:
        self.folder, self.canary, self.secret = folder, folder / "canary", folder / "secret"
        self.canary.write_text("alive")
        self.secret.write_text(SECRET)
        (folder / "tree").mkdir()
        (folder / "tree" / "leaf").write_text("green")
        (folder / "work").mkdir()
        self.shared_memory = Path("/dev/shm") / str(folder).replace("/", "_")
        self.environment = {**os.environ, "RLHUB_TEST_SECRET": SECRET}
        self.victim = subprocess.Popen(["sleep", "60"], cwd=folder, env=self.environment) if needs_victim else None
        self.port, self.socket = listening

    def program(self, source: str, bound: int) -> str:
        names = {
            "SECRET_FILE": str(self.secret),
            "CANARY": str(self.canary),
            "FOLDER": str(self.folder),
            "HOME_FOLDER": str(Path.home()),
            "REPOSITORY": str(REPOSITORY),
            "VICTIM": self.victim.pid if self.victim else 0,
            "PORT": self.port,
            "SOCKET": self.socket,
            "BOUND": bound,
        }
        return "\n".join([*(f"{name} = {value!r}" for name, value in names.items()), source])

    def disturbed(self) -> bool:
        return (
            not self.canary.is_file()
            or self.canary.is_symlink()
            or stat.S_IMODE(self.canary.stat().st_mode) == 0
            or self.canary.read_text() != "alive"
            or not (self.folder / "tree" / "leaf").exists()
            or (self.folder / "escaped").exists()
            or self.shared_memory.exists()
            or (self.victim is not None and self.victim.poll() is not None)
        )

    def close(self) -> None:
        self.shared_memory.unlink(missing_ok=True)
        if self.victim:
            self.victim.kill()
            self.victim.wait()


@pytest.fixture(scope="module", autouse=True)
def no_core_files():
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limits)


@pytest.fixture(scope="module")
def listening(tmp_path_factory):
    """A port (TCP and UDP) and a name (file and abstract) that answer."""
    name = str(tmp_path_factory.mktemp("socket") / "s")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        with socket.socket(socket.AF_UNIX) as file, socket.socket(socket.AF_UNIX) as abstract:
            for listener, address in ((file, name), (abstract, "\0" + name)):
                listener.bind(address)
                listener.listen(64)
            yield port, name


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    """The reward, in a process with a secret in its environment and an inheritable descriptor of another."""
    with pytest.MonkeyPatch.context() as patch, open(tmp_path_factory.mktemp("secret") / "secret", "w+") as secret:
        patch.setenv("RLHUB_TEST_SECRET", SECRET)
        secret.write(SECRET)
        secret.flush()
        os.set_inheritable(secret.fileno(), True)
        yield load_grader({"name": "code_tests", "deadline_seconds": DEADLINE, "memory_megabytes": 256})


@pytest.fixture
def world(tmp_path, listening, request):
    world = World(tmp_path, listening, "VICTIM" in request.getfixturevalue("hostile").source)
    yield world
    world.close()


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: f"{hostile.sign}: {hostile.name}")
def test_hostile_program_succeeds_without_the_sandbox_and_fails_inside(hostile, world, grader, tmp_path, listening):
    assert harms(hostile, world), "the positive control: without the sandbox it succeeds"
    world.close()
    inside = tmp_path / "inside"
    inside.mkdir()
    fresh = World(inside, listening, world.victim is not None)
    try:
        completion = f"```python\n{fresh.program(hostile.source, bound=10**9)}\n```"
        if isinstance(hostile, Forgery):
            row = {"prompt": hostile.prompt, "test": hostile.test, "entry_point": "add"}
        elif hostile.sign in ("unpickles", "evaluates"):
            row = {"prompt": "", "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n", "entry_point": "add"}
        else:
            row = ESCAPES
        started = time.monotonic()
        result = grader("", completion, row)
        seconds = time.monotonic() - started
        assert (result.value, result.status) == (0.0, "ok") and result.detail, result
        assert seconds < DEADLINE + 1
        wait_until(lambda: not children(server("strong").pid))
        assert not fresh.disturbed()
        assert grader("", GOOD_PROGRAM, GOOD).value == 1.0
    finally:
        fresh.close()


def test_there_are_enough_hostile_programs():
    assert len({hostile.source for hostile in HOSTILE}) >= 60


def harms(hostile: Hostile, world: World) -> bool:
    """Whether it does its harm in a throw-away process without the sandbox."""
    source = world.program(hostile.source, bound=60)
    if isinstance(hostile, Forgery):
        # What graders commonly do: one file with program and tests, and exit code 0 is a pass.
        source = f"{hostile.prompt}\n{hostile.source}\n{hostile.test}\ncheck(add)\n"
    elif hostile.sign == "unpickles":
        source += "\nimport pickle\npickle.loads(pickle.dumps(add(2, 3)))"
    elif hostile.sign == "evaluates":
        source += "\neval(add(2, 3))"
    (world.folder / "program.py").write_text(source)
    command = [*PYTHON, str(world.folder / "program.py")]
    if hostile.sign == "kills":
        command = [*PYTHON, "-c", f"import subprocess\nsubprocess.run({command!r})\nprint('ALIVE')"]
    if hostile.sign == "crashes":
        command = [*PYTHON, "-c", f"exec(open({command[-1]!r}).read(), {{}})\nprint('ALIVE')"]
    with open(world.secret) as secret:
        process = subprocess.Popen(
            command,
            cwd=world.folder / "work",
            env=world.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[secret.fileno()],
            start_new_session=True,
        )
    ended = True
    try:
        output, _ = process.communicate(timeout={"outlives": 0.7, "kills": 1.5}.get(hostile.sign, 20.0))
    except subprocess.TimeoutExpired:
        ended, output = False, b""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    match hostile.sign:
        case "prints":
            return b"ESCAPED" in output.split()
        case "outlives":
            return not ended
        case "floods":
            return len(output) > 2 * 2**20
        case "kills" | "crashes":
            return b"ALIVE" not in output
        case "forges":
            return ended and process.returncode == 0
    return wait_until(world.disturbed)


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def wait_until(condition, seconds=3.0) -> bool:
    until = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.01)
    assert met
    return met


def inside(source: str, **limits) -> str:
    outcome = run_script(source, limits=Limits(**{"deadline_seconds": 10, **limits}))
    assert outcome.code == 0, outcome
    return outcome.stdout.decode()


def test_all_layers_are_in_force_here(maker):  # noqa: F811
    found = layers()
    assert f"made by {maker}" in found["root"]
    assert found["namespaces"] == "user, pid, mount, network, ipc, uts"
    assert set(found) == {"namespaces", "root", "privileges", "limits", "cgroup"}


def test_the_root_holds_the_interpreter_only_and_cannot_be_written():
    listing = inside(
        "import os\nprint(*sorted(os.listdir('/')))\nprint(*os.listdir('/proc'), *os.listdir('/tmp'))\nprint(*sorted(os.listdir('/dev')))"
    )
    root, nothing, devices = listing.splitlines()
    allowed = {"bin", "dev", "lib", "lib64", "proc", "tmp", "usr", Path(os.__file__).parts[1], Path(sys.base_prefix).parts[1]}
    assert set(root.split()) <= allowed and not nothing
    packages = "import os\nfolder = os.path.dirname(os.__file__) + '/site-packages'\nprint(os.path.exists(folder) and os.listdir(folder))"
    assert inside(packages) in ("[]\n", "False\n")
    assert devices.split() == ["full", "null", "random", "shm", "urandom", "zero"]
    probe = (
        "import os\nfor folder in ('/', os.path.dirname(os.__file__), '/dev', '/proc'):\n"
        "    try: open(folder + '/new', 'w')\n    except OSError as error: print(error.errno)"
    )
    assert inside(probe).split() == [str(errno.EROFS)] * 4


def test_a_program_has_no_privileges_and_its_own_names():
    facts = inside(
        "import ctypes, os, socket\nlibc = ctypes.CDLL(None)\nheader, data = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)()\n"
        "libc.capget(header, data)\nprint(sum(data), sum(libc.prctl(23, c, 0, 0, 0) == 1 for c in range(64)))\n"
        "print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0), os.getpid(), os.getuid(), socket.gethostname())\n"
        "print(*sorted(os.environ))"
    ).splitlines()
    assert facts == ["0 0", "1 2 2 1000 sandbox", "HOME LANG PATH PYTHONHASHSEED TMPDIR"]


def test_a_program_runs_the_same_every_time():
    """Sets of texts have the order, and random numbers the values, that they have in every other sandbox."""
    source = "print(hash('a'))"
    expected = subprocess.run([*PYTHON, "-c", source], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True).stdout
    assert inside(source) == expected
    assert inside("import random\nprint(random.random())") == f"{random.Random(0).random()}\n"


def test_nothing_stays_for_the_next_program():
    source = "import os\nprint(os.listdir('.'))\nopen('left', 'w').write('x')"
    assert [inside(source) for _ in range(2)] == ["[]\n"] * 2


def test_every_forbidden_call_is_refused():
    column = ARCHITECTURES[os.uname().machine][0]
    numbers = {name: number[column] for name, number in FORBIDDEN.items() if number[column] >= 0}
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers!r}.items():\n    libc.syscall(number, -1, -1, -1, -1, -1, -1)\n    print(name, ctypes.get_errno())"
    )
    assert inside(source).split("\n")[:-1] == [f"{name} {errno.EPERM}" for name in numbers]


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_decides_as_its_table_says(machine):
    column, architecture = ARCHITECTURES[machine]
    code = list(struct.iter_unpack("HBBI", filter_code(machine)))

    def answer(number: int, flags: int = 0, architecture: int = architecture) -> int:
        """Runs the five instructions of classic BPF that the filter uses."""
        data = struct.pack("IIQQQQQQQ", number, architecture, 0, flags, 0, 0, 0, 0, 0)
        at, value = 0, 0
        while True:
            operation, if_true, if_false, k = code[at]
            at += 1
            if operation == 0x06:
                return k
            if operation == 0x20:
                value = struct.unpack_from("I", data, k)[0]
            else:
                at += if_true if {0x15: value == k, 0x25: value > k, 0x45: bool(value & k)}[operation] else if_false

    allow, deny, missing, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
    forbidden = {numbers[column] for numbers in FORBIDDEN.values()}
    for number in range(LAST_KNOWN + 1):
        if number == CLONE3[column]:
            assert answer(number) == missing
        else:
            assert answer(number) == (deny if number in forbidden else allow), number
    assert answer(CLONE[column], flags=0x10000000 | 17) == deny
    assert answer(LAST_KNOWN + 1) == answer(0x40000000) == missing
    assert answer(0, architecture=0x40000003) == kill


def test_all_processes_together_stay_within_the_memory_of_one():
    """Eight processes of 100 MB each, where 512 MB are allowed."""
    source = (
        "import os, time\nread, write = os.pipe()\nfor _ in range(8):\n    if os.fork() == 0:\n"
        "        data = bytearray(b'x') * (100 * 2**20)\n"
        "        os.write(write, b'x')\n        time.sleep(5)\n        os._exit(0)\n"
        "count = 0\nwhile count < 8:\n    count += len(os.read(read, 8))\nprint('ESCAPED')"
    )
    outcome = run_script(source, limits=Limits(deadline_seconds=2.0))
    if "no memory cgroup" in layers()["cgroup"]:
        assert outcome.stdout == b"ESCAPED\n"  # as docs/sandbox.md says of such a machine
    else:
        assert b"ESCAPED" not in outcome.stdout


@pytest.mark.parametrize("mode", MODES)
def test_how_programs_end(mode):
    def outcome(source, stdin=""):
        return run_script(source, stdin, Limits(deadline_seconds=1.0, output_kilobytes=64), mode)

    assert outcome("import sys\nprint(sys.stdin.read()[::-1])\nsys.exit(3)", "abc").stdout == b"cba\n"
    assert outcome("import sys\nsys.exit(3)").code == 3
    assert outcome("import os\nos.kill(os.getpid(), 9)").code == 137
    failed = outcome("1 / 0")
    assert failed.code == 1 and failed.stderr.strip().endswith(b"ZeroDivisionError: division by zero")
    assert outcome("import atexit\natexit.register(print, 'bye')\nprint('hello')").stdout == b"hello\nbye\n"
    slow = outcome("while True: pass")
    assert slow.ending == "deadline" and slow.seconds < 2.0
    flood = outcome("while True: print('x' * 1000)")
    assert flood.ending == "output" and len(flood.stdout) <= 2 * 65536


def test_without_namespaces_it_refuses_and_names_the_way_out():
    closed = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", closed, "-", sys.executable, "-m", "rewards.sandbox"]
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2, refused
    assert "a user namespace: unshare: No space left on device" in refused.stderr and "sandbox: weak" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    prepare = (
        "from rewards import load_grader\ntry: load_grader({'name': 'code_tests'}).prepare()\nexcept ValueError as error: print(error)"
    )
    early = subprocess.run([*command[:-2], "-c", prepare], cwd=REPOSITORY, capture_output=True, text=True)
    assert early.stdout == refused.stderr, early
    weak = subprocess.run([*command, "weak"], cwd=REPOSITORY, capture_output=True, text=True)
    assert weak.returncode == 0 and "group" in weak.stdout


def test_bubblewrap_makes_the_root_where_it_can():
    """Then every test of this module runs in both roots; where it cannot, the reason is shown."""
    if not MADE_BY.startswith(BUBBLEWRAP):
        pytest.skip(f"the root is made by {MADE_BY}")


@pytest.mark.parametrize("fault", ["exit 1", "echo 'bwrap: no way' >&2; exit 1", "kill -9 $$", "sleep 60"])
def test_a_bubblewrap_that_does_not_work_is_named_and_not_needed(fault, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # which nobody can reach, unlike pytest's
        bwrap = Path(folder, "bwrap")
        bwrap.write_text(f"#!/bin/sh\n{fault}\n")
        for path in (folder, bwrap):
            os.chmod(path, 0o755)
        monkeypatch.setenv("PATH", folder, prepend=os.pathsep)
        close()
        try:
            assert f"made by rewards.sandbox ({bwrap} cannot do it" in layers()["root"]
            assert ("no way" in fault) == ("no way" in layers()["root"])
            assert inside("print(1)") == "1\n"
        finally:
            close()


def test_it_runs_in_a_container_whose_only_user_is_root():
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-m", "rewards.sandbox"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.returncode == 0 and "as user 1000" in found.stdout, found


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="strong, weak"):
        code_tests.Config(sandbox="medium")
    with pytest.raises(ValueError, match="strong, weak"):
        run_script("", mode="medium")


def test_programs_end_with_their_grader():
    """Kill -9 of the grader leaves nothing that runs."""
    source = "import time; from rewards.sandbox import *; run_script('while True: pass', limits=Limits(deadline_seconds=60))"
    grader = subprocess.Popen([sys.executable, "-c", source], cwd=REPOSITORY)
    wait_until(lambda: children(grader.pid).split() and len(tree(grader.pid)) >= 4, seconds=20)
    started = tree(grader.pid)
    grader.kill()
    grader.wait()
    wait_until(lambda: not any(running(pid) for pid in started))


def tree(pid: int) -> list[int]:
    found = []
    for child in map(int, children(pid).split()):
        with suppress(FileNotFoundError):
            found += [child, *tree(child)]
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_dead_server_is_replaced():
    assert inside("print(1)") == "1\n"
    process = server("strong").process
    process.kill()
    process.wait()
    assert inside("print(2)") == "2\n"


def test_a_forked_grader_has_a_server_of_its_own():
    assert inside("print(1)") == "1\n"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, inside("print(2)").encode())
            close()
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        assert answer.read() == b"2\n"
    os.waitpid(child, 0)
    assert inside("print(3)") == "3\n"
