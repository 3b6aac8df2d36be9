"""Takes vLLM's arguments, starts an "engine core" that would outlive it, and answers what a server answers when asked.

STAND_IN_FAILS names a file: while it is there, a start fails with its text. STAND_IN_START_S delays the start.
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def arguments() -> dict[str, str]:
    """``--name value`` pairs."""
    words = sys.argv[1:]
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


class Answer(BaseHTTPRequestHandler):
    """Health, settings, and the name of the served model."""

    def do_GET(self) -> None:
        given = arguments()
        blocks, size = given.get("--num-gpu-blocks-override", "100"), given["--block-size"]
        body = {
            "/health": "",
            "/version": json.dumps({"version": "0.0.stand-in"}),
            "/v1/models": json.dumps({"data": [{"max_model_len": int(given["--max-model-len"])}]}),
            "/metrics": f'vllm:cache_config_info{{block_size="{size}",num_gpu_blocks="{blocks}"}} 1.0\n',
        }.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def log_message(self, *values: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve until told to end."""
    fails = os.environ.get("STAND_IN_FAILS")
    if fails and Path(fails).is_file():
        sys.exit(Path(fails).read_text())
    print("Resolved architecture: LlamaForCausalLM", flush=True)
    time.sleep(float(os.environ.get("STAND_IN_START_S", "0")))
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # engine core"])
    given = arguments()
    ThreadingHTTPServer((given["--host"], int(given["--port"])), Answer).serve_forever()


if __name__ == "__main__":
    main()
