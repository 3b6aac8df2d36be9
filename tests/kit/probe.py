"""Kills a process and asks at once, again and again: ``python -m tests.kit.probe --pid P --port P --prompt TEXT``.

In a process of its own, because a client that reads a thousand streams would count its own queue as the gateway's.
Prints when it killed, and one JSON line per answer: ``id``, ``at_s`` after the kill, ``took_s``, ``status``,
``retry_after``.
"""

import argparse
import http.client
import json
import os
import signal
import time
from typing import Any


def ask(port: int, prompt: str, request_id: str) -> tuple[int, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": prompt, "max_tokens": 1})
    headers = {"content-type": "application/json", "x-request-id": request_id}
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.getheader("retry-after")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    os.kill(arguments.pid, signal.SIGKILL)
    killed_s = sent_s = time.monotonic()
    print(json.dumps({"killed_s": killed_s}), flush=True)
    while sent_s < killed_s + arguments.seconds:
        line: dict[str, Any] = {"id": f"probe-{sent_s:.6f}", "at_s": sent_s - killed_s}
        line["status"], line["retry_after"] = ask(arguments.port, arguments.prompt, line["id"])
        line["took_s"] = time.monotonic() - sent_s
        print(json.dumps(line), flush=True)
        time.sleep(0.005)
        sent_s = time.monotonic()


if __name__ == "__main__":
    main()
