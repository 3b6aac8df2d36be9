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
    """Health, settings, the name of the served model, and streams of made-up words."""

    protocol_version = "HTTP/1.1"

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
        self.send_header("content-length", str(len(body or "")))
        self.end_headers()
        self.wfile.write((body or "").encode())

    def do_POST(self) -> None:
        """Stream as many words as asked for, one every 50 ms."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for index in range(asked["max_tokens"]):
            self.event(json.dumps({"choices": [{"index": 0, "text": f" word{index}"}]}))
            time.sleep(0.05)
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        """Send one event in a chunk of its own."""
        text = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))

    def log_message(self, *values: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Lets more than socketserver's five clients come at once."""

    request_queue_size = 128


def main() -> None:
    """Serve until told to end."""
    fails = os.environ.get("STAND_IN_FAILS")
    if fails and Path(fails).is_file():
        sys.exit(Path(fails).read_text())
    print("Resolved architecture: LlamaForCausalLM", flush=True)
    time.sleep(float(os.environ.get("STAND_IN_START_S", "0")))
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # engine core"])
    given = arguments()
    Server((given["--host"], int(given["--port"])), Answer).serve_forever()


if __name__ == "__main__":
    main()
