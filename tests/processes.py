"""Tests in a process of their own, which finds this bnbq: interrupted on the way, or with its memory watched."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import bnbq

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(bnbq.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
}


def python(script: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**ENVIRONMENT, **environment})


def assert_interrupt_leaves_nothing(folder: Path, signal: str, function: str, arguments: list) -> None:
    """The command gets the signal in the first call of ``function``, by its full name, for a Job of layer 1."""
    done = python(f"""
        import os, signal, sys
        import bnbq.cli, bnbq.convert, bnbq.stream
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        made = {function}
        def slow(*arguments):
            job = next(a for a in arguments if isinstance(a, bnbq.stream.Job))
            if job.module and "layers.1" in job.module:
                os.kill(os.getpid(), signal.{signal})
            return made(*arguments)
        {function} = slow
        sys.exit(bnbq.cli.main({[str(a) for a in arguments]}))
    """)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip().splitlines()[-1] == "bnbq: interrupted"
    assert list(folder.iterdir()) == []


def memory_growth(imports: str, warm_up: str, watched: str, fact: str) -> list[int]:
    """By how many bytes anonymous memory grows at most while ``watched`` runs, after ``warm_up`` (lazy imports, thread
    pools), and what ``fact`` is then."""
    script = f"""
        import threading
        {imports}
        def anonymous():
            text = open("/proc/self/status").read()
            return int(text[text.index("RssAnon:") + 8:].split()[0]) * 1024
        {warm_up}
        base, peak, done = anonymous(), 0, threading.Event()
        def watch():
            global peak
            while not done.wait(0.001):
                peak = max(peak, anonymous())
        thread = threading.Thread(target=watch)
        thread.start()
        {watched}
        done.set()
        thread.join()
        print(peak - base, {fact})
    """
    done = python(script, MALLOC_MMAP_THRESHOLD_="65536")  # what is freed goes back, so that holes do not count
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
