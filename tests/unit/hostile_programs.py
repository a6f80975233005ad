"""Programs that try to harm the grader, the machine or the verdict, each with the sign by which one sees that it succeeded.

prints     its output is ESCAPED
disturbs   a file outside was made, changed or removed, or a process killed
outlives   it still runs after the deadline
floods     it writes more than two megabytes
kills      the process that started it is dead or hangs
crashes    the process that executes it is dead
forges     naive tests in the same process say that it passed
unpickles, evaluates   reading its result runs its code

Names in capitals are given: SECRET_FILE, CANARY, FOLDER, HOME_FOLDER, REPOSITORY, VICTIM (a process), PORT and SOCKET (listening), and
BOUND, which keeps bombs small where there is no sandbox.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hostile:
    name: str
    sign: str
    source: str


@dataclass(frozen=True)
class Forgery(Hostile):
    prompt: str = ""
    test: str = "def check(candidate):\n    assert candidate(2, 3) == 1005\n    assert candidate(3, 4) == 1007\n"


CTYPES = "import ctypes, os, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
X86 = "import platform\nx86 = platform.machine() == 'x86_64'\n"

BOMBS = {
    "fork, children wait": """
import os, time
for count in range(1, BOUND + 1):
    if os.fork() == 0:
        time.sleep(1); os._exit(0)
    if count == 50:
        print("ESCAPED", flush=True)
""",
    "fork, children fork": """
import os, time
read, write = os.pipe()
for _ in range(6 if BOUND < 99 else BOUND):
    try: os.fork()
    except OSError: pass
os.write(write, b"x")
time.sleep(0.3)
os.set_blocking(read, False)
if len(os.read(read, 1000)) >= 50: os.write(1, b"ESCAPED\\n")
os._exit(0)
""",
    "threads": """
import threading, time
for count in range(1, BOUND + 1):
    threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start()
    if count == 50:
        print("ESCAPED", flush=True)
""",
    "memory, one object": "data = bytearray(300 * 2**20)\nprint('ESCAPED')",
    "memory, many objects": "data = [bytes(2**20) for _ in range(300)]\nprint('ESCAPED')",
    "memory, mapped": "import mmap\ndata = [mmap.mmap(-1, 2**26) for _ in range(5)]\nprint('ESCAPED')",
    "memory, shared segment": CTYPES + "if libc.shmget(0, ctypes.c_size_t(2**26), 0o1600) >= 0: print('ESCAPED')",
    "memory, anonymous file": "import os\nfile = os.memfd_create('x')\nos.write(file, bytes(2**20))\nprint('ESCAPED')",
    "disk, one file": "open('big', 'wb').write(bytes(2**25))\nprint('ESCAPED')",
    "disk, sparse file": "open('big', 'wb').truncate(2**33)\nprint('ESCAPED')",
    "disk, many files": "for n in range(1200): open(f'f{n}', 'w').close()\nprint('ESCAPED')",
    "disk, many large files": "for n in range(8): open(f'f{n}', 'wb').write(bytes(2**22))\nprint('ESCAPED')",
    "open files": "files = [open('/dev/null') for _ in range(100)]\nprint('ESCAPED')",
    "limits raised": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('ESCAPED')",
}

ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(3600)",
    "catastrophic pattern": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "huge power": "x = 9 ** 9 ** 9",
    "loop at exit": "import atexit, time\natexit.register(time.sleep, 3600)",
    "thread that never ends": "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()",
    "signals ignored": """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)
""",
    "signals blocked": "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: time.sleep(1)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "waits for a child that waits": "import os, time\nif os.fork() == 0: time.sleep(3600)\nos.wait()",
}

FLOODS = {
    "stdout": "for _ in range(BOUND): print('x' * 100_000)",
    "stderr": "import sys\nfor _ in range(BOUND): sys.stderr.write('x' * 100_000)",
    "from a child that stays": "import os\nif os.fork() == 0:\n    for _ in range(BOUND): os.write(1, b'x' * 65536)\nelse: os.wait()",
}

KILLS = {
    "parent killed": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "parent stopped": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
    "group killed": "import os, signal\nos.killpg(0, signal.SIGKILL)",
}

CRASHES = {
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "exit at once": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "nested too deep": """
import sys
sys.setrecursionlimit(10**8)
x = []
for _ in range(10**5): x = [x]
repr(x)
""",
}

DISTURBS = {
    "file deleted": "import os\nos.unlink(CANARY)",
    "file overwritten": "open(CANARY, 'w').write('gone')",
    "file appended": "open(CANARY, 'a').write('more')",
    "file truncated": "import os\nos.truncate(CANARY, 0)",
    "file renamed": "import os\nos.rename(CANARY, CANARY + '2')",
    "file replaced by a link": "import os\nos.unlink(CANARY); os.symlink('/etc/hosts', CANARY)",
    "rights changed": "import os\nos.chmod(CANARY, 0)",
    "tree deleted": "import shutil\nshutil.rmtree(FOLDER + '/tree')",
    "file written by way of /proc": "open('/proc/self/root' + CANARY, 'w').write('gone')",
    "file written by way of a descriptor": "import os\nroot = os.open('/', os.O_RDONLY)\nos.unlink(CANARY[1:], dir_fd=root)",
    "database made": "import sqlite3\nsqlite3.connect(FOLDER + '/escaped').execute('create table x (y)')",
    "shared memory file made": "open('/dev/shm/' + FOLDER.replace('/', '_'), 'w').write('x')",
    "process killed": "import os, signal\nos.kill(VICTIM, signal.SIGKILL)",
    "process killed by descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(VICTIM), signal.SIGKILL)",
    "daemon left behind": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.3)
        open(FOLDER + '/escaped', 'w').write('late')
    os._exit(0)
""",
}

READS = {
    "secret file": "if 'hunter2' in open(SECRET_FILE).read(): print('ESCAPED')",
    "secret by a symbolic link": "import os\nos.symlink(SECRET_FILE, 'link')\nif 'hunter2' in open('link').read(): print('ESCAPED')",
    "secret by a hard link": "import os\nos.link(SECRET_FILE, 'hard')\nif 'hunter2' in open('hard').read(): print('ESCAPED')",
    "secret by climbing": "if 'hunter2' in open('../' * 40 + SECRET_FILE[1:]).read(): print('ESCAPED')",
    "secret by /proc/self/root": "if 'hunter2' in open('/proc/self/root' + SECRET_FILE).read(): print('ESCAPED')",
    "secret by a process's folder": "if 'hunter2' in open(f'/proc/{VICTIM}/cwd/secret').read(): print('ESCAPED')",
    "secret by a copied descriptor": """
import os
for descriptor in range(3, 256):
    try:
        if b'hunter2' in os.pread(descriptor, 10**6, 0): print('ESCAPED')
    except OSError: pass
""",
    "secret in the environment": "import os\nif 'hunter2' in str(os.environ): print('ESCAPED')",
    "secret in its first environment": "if 'hunter2' in open('/proc/self/environ').read(): print('ESCAPED')",
    "secret in another's environment": "if 'hunter2' in open(f'/proc/{VICTIM}/environ').read(): print('ESCAPED')",
    "accounts": "if 'root' in open('/etc/passwd').read(): print('ESCAPED')",
    "home folder": "import os\nif len(os.listdir(HOME_FOLDER)) > 1: print('ESCAPED')",
    "repository": "if 'rlhub' in open(REPOSITORY + '/pyproject.toml').read(): print('ESCAPED')",
    "process listing": "import os\nif str(VICTIM) in os.listdir('/proc'): print('ESCAPED')",
    "process probing": "import os\nos.kill(VICTIM, 0)\nprint('ESCAPED')",
    "command lines": "if open(f'/proc/{VICTIM}/cmdline').read(): print('ESCAPED')",
    "memory of a process": "open(f'/proc/{VICTIM}/maps').read()\nopen('/proc/self/mem', 'rb')\nprint('ESCAPED')",
    "mounts": "if open('/proc/self/mounts').read(): print('ESCAPED')",
    "system tree": "import os\nif os.listdir('/sys'): print('ESCAPED')",
    "start of the machine": "if 'btime' in open('/proc/stat').read(): print('ESCAPED')",
    "own score for the memory killer": "open('/proc/self/oom_score_adj', 'w').write('900')\nprint('ESCAPED')",
}

NETWORK = {
    "connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint('ESCAPED')",
    "datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))\nprint('ESCAPED')",
    "server": "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')",
    "local socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(SOCKET)\nprint('ESCAPED')",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + SOCKET)\nprint('ESCAPED')",
    "interfaces": "import socket\nif socket.if_nameindex(): print('ESCAPED')",
    "routing": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')",
    "past the library": CTYPES + "if libc.socket(2, 1, 0) >= 0: print('ESCAPED')",
    "from a child": """
import os, socket
if os.fork() == 0:
    socket.create_connection(('127.0.0.1', PORT), 1)
    print('ESCAPED')
else:
    os.wait()
""",
}

KERNEL = {
    "ptrace of itself": CTYPES + "if libc.ptrace(0, 0, 0, 0) == 0: print('ESCAPED')",
    "ptrace of a child": CTYPES
    + """
import signal, time
child = os.fork()
if child == 0: time.sleep(1)
elif libc.ptrace(16, child, 0, 0) == 0: print('ESCAPED')
if child: os.kill(child, signal.SIGKILL)
""",
    "memory of another process": CTYPES
    + """
buffer, word = ctypes.create_string_buffer(b'ESCAPED'), ctypes.create_string_buffer(8)
local, remote = struct.pack('PN', ctypes.addressof(word), 8), struct.pack('PN', ctypes.addressof(buffer), 8)
if libc.process_vm_readv(os.getpid(), local, 1, remote, 1, 0) == 8: print(word.value.decode())
""",
    "new user namespace": CTYPES + "if libc.unshare(0x10000000) == 0: print('ESCAPED')",
    "new namespaces and a mount": CTYPES
    + """
if libc.unshare(0x10020000) == 0 and libc.mount(b'tmpfs', os.getcwd().encode(), b'tmpfs', 0, None) == 0: print('ESCAPED')
""",
    "namespace by clone": CTYPES
    + X86
    + """
pid = libc.syscall(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0: os._exit(0)
if pid > 0: print('ESCAPED')
""",
    "namespace by clone3": CTYPES
    + """
pid = libc.syscall(435, struct.pack('QQQQQQQQ', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)
if pid == 0: os._exit(0)
if pid > 0: print('ESCAPED')
""",
    "other personality": CTYPES + "if libc.personality(0x40000) >= 0: print('ESCAPED')",
    "file handle": CTYPES
    + """
handle, mount = ctypes.create_string_buffer(struct.pack('Ii', 120, 0), 128), ctypes.create_string_buffer(4)
if libc.name_to_handle_at(-100, b'/', handle, mount, 0) == 0: print('ESCAPED')
""",
}

GROUPS = {
    "prints": BOMBS | READS | NETWORK | KERNEL,
    "outlives": ENDLESS,
    "floods": FLOODS,
    "kills": KILLS,
    "crashes": CRASHES,
    "disturbs": DISTURBS,
}

ROUGHLY = "def check(candidate):\n    assert abs(candidate(2, 3) - 5) < 1e-6\n    assert abs(candidate(3, 4) - 7) < 1e-6\n"
SETS = "def check(candidate):\n    assert set(candidate(2, 3)) == set([2, 3])\n    assert sorted(candidate(3, 4)) == [3, 4]\n"
FABS = "import math\ndef check(candidate):\n    assert math.fabs(candidate(2, 3) - 5) < 1e-6\n"
INPLACE = "def check(candidate):\n    numbers = [3, 1, 2]\n    assert candidate(numbers, 0) == sorted(numbers)\n"
POLY = "def poly(coefficients, x):\n    return sum(c * x**n for n, c in enumerate(coefficients))\n\n\n"
MAPPED = "def check(candidate):\n    assert all(map(lambda n: candidate(n, 1) == n + 1, [1, 2, 3]))\n"
ROOT = "def check(candidate):\n    assert abs(poly([-8.0, 1.0], candidate(-8.0, 1.0))) < 1e-6\n"
RAISES = "def check(candidate):\n    try:\n        candidate(2, 3)\n    except:\n        pass\n    assert candidate(2, 3) == 1005\n"

EQUAL = """
class Equal{base}:
    __hash__ = None
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
    def __contains__(self, other): return True
def add(a, b): return Equal()
"""

FORGERIES = [
    Forgery("exit code 0 at once", "forges", "import os\nos._exit(0)"),
    Forgery("sys.exit at once", "forges", "import sys\nsys.exit(0)"),
    Forgery("exit in the call", "forges", "import sys\ndef add(a, b): sys.exit(0)"),
    Forgery("exit past a bare except", "forges", "import os\ndef add(a, b): os._exit(0)", test=RAISES),
    Forgery("parent exits, child goes on", "forges", "import os\nif os.fork(): os._exit(0)\ndef add(a, b): return 0"),
    Forgery("hook for uncaught errors", "forges", "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\ndef add(a, b): return 0"),
    Forgery("exit code changed at exit", "forges", "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0"),
    Forgery(
        "killed by its own alarm",
        "forges",
        """
import os, signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.05)
def add(a, b):
    while True: pass
""",
    ),
    Forgery("equal to everything", "forges", EQUAL.replace("{base}", "")),
    Forgery("a number equal to everything", "forges", EQUAL.replace("{base}", "(int)")),
    Forgery("a text equal to everything", "forges", EQUAL.replace("{base}", "(str)")),
    Forgery("close to everything", "forges", EQUAL.replace("{base}", "(float)"), test=ROUGHLY),
    Forgery("built-in abs replaced", "forges", "import builtins\nbuiltins.abs = lambda x: 0\ndef add(a, b): return 0", test=ROUGHLY),
    Forgery(
        "built-in set and sorted replaced",
        "forges",
        "import builtins\nbuiltins.set = lambda x: 0\nbuiltins.sorted = lambda x: [3, 4]\ndef add(a, b): return ()",
        test=SETS,
    ),
    Forgery("built-ins shadowed", "forges", "set = lambda x: 0\nsorted = lambda x: [3, 4]\ndef add(a, b): return ()", test=SETS),
    Forgery("module patched", "forges", "import math\nmath.fabs = lambda x: 0\ndef add(a, b): return 0", test=FABS),
    Forgery(
        "module replaced",
        "forges",
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(fabs=lambda x: 0)\ndef add(a, b): return 0",
        test=FABS,
    ),
    Forgery("helper of the tests redefined", "forges", "def poly(c, x): return 0\ndef add(a, b): return 0", prompt=POLY, test=ROOT),
    Forgery("end of an iteration raised", "forges", "def add(a, b): raise StopIteration", test=MAPPED),
    Forgery("arguments emptied", "forges", "def add(a, b):\n    a.clear()\n    return []", test=INPLACE),
    Forgery(
        "tests read from the caller",
        "forges",
        """
import sys
seen = []
def add(a, b):
    seen.append(1)
    return [c for c in sys._getframe(1).f_code.co_consts if isinstance(c, int) and c > 1000][len(seen) - 1]
""",
    ),
    Forgery(
        "tests read from the file",
        "forges",
        """
import re, sys
answers = re.findall(r'== (\\d+)$', open(sys.argv[0]).read(), re.M)
def add(a, b): return int(answers.pop(0))
""",
    ),
    Forgery(
        "tests found in memory and replaced",
        "forges",
        """
import gc
def add(a, b):
    check = next(o for o in gc.get_objects() if getattr(o, '__name__', '') == 'check' and callable(o))
    raise SystemExit(0)
""",
    ),
    Forgery(
        "assertions caught by a tracer",
        "forges",
        """
import os, sys
def tracer(frame, event, argument):
    if event == 'exception' and frame.f_code.co_name == 'check': os._exit(0)
    return tracer
sys.settrace(tracer)
def add(a, b): return 0
""",
    ),
    Forgery(
        "verdict written to every descriptor",
        "forges",
        """
import os
def add(a, b): return 0
for descriptor in range(64):
    for line in (b'{"token": "", "passed": 2, "total": 2, "done": true, "failure": "", "broken": ""}\\n', b'{"value": 1005}\\n'):
        try: os.write(descriptor, line)
        except OSError: pass
os._exit(0)
""",
    ),
]

DESERIALISATIONS = [
    Hostile(
        "result that runs code when unpickled",
        "unpickles",
        """
class Result:
    def __reduce__(self): return exec, (f"open({FOLDER!r} + '/escaped', 'w')",)
def add(a, b): return Result()
""",
    ),
    Hostile(
        "result that runs code when evaluated",
        "evaluates",
        """
def add(a, b): return f"open({FOLDER!r} + '/escaped', 'w')"
""",
    ),
]

HOSTILE = [Hostile(name, sign, source) for sign, group in GROUPS.items() for name, source in group.items()] + FORGERIES + DESERIALISATIONS
