"""The side of the conversation that runs in a child: requests come down one pipe, answers go up another.

    python -m MODULE JOB_JSON REQUESTS_FD ANSWERS_FD          (instruments/child.py is the other side)

A request is a line of JSON, ``{"do": name, ...}``; it is answered by a line with what the handler returned, or
``{"error": ...}``, after which the process ends with status 1. Between requests it sleeps in a blocking read; it also
ends when the pipe is closed.
Whatever libraries print goes elsewhere and can not end up in an answer.
"""

from __future__ import annotations

import json
import resource
import traceback
from collections.abc import Callable
from typing import Any

Handlers = dict[str, Callable[..., dict[str, Any]]]


def _limit_data(limit: int) -> None:
    """Makes an allocation beyond `limit` bytes fail at once; where the kernel refuses, the parent's watch remains."""
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (OSError, ValueError):
        traceback.print_exc()


def reason(error: Exception) -> str:
    """An exception in one line. A GPU's want of memory comes with a paragraph, of which the first two sentences do."""
    lines = [text for text in str(error).splitlines() if text.strip()]
    first = lines[0] if lines else ""
    if "out of memory" in first:
        first = ". ".join(first.split(". ")[:2])
    return f"{type(error).__name__}: {first}".strip(": ")


def main(argv: list[str], make: Callable[[dict[str, Any]], Handlers]) -> int:
    """Serve the handlers that ``make(job)`` gives, until the requests end or one fails; the exit status."""
    job = json.loads(argv[0])
    if job.get("memory_limit"):
        _limit_data(job["memory_limit"])
    handlers = make(job)
    with open(int(argv[1])) as requests, open(int(argv[2]), "w") as answers:
        for line in requests:
            request = json.loads(line)
            try:
                answer = handlers[request.pop("do")](**request)
            except Exception as error:  # any failure is a result
                traceback.print_exc()
                answer = {"error": reason(error)}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if "error" in answer:
                return 1
    return 0
