"""An engine for tests: HTTP in front of the simulated scheduler, with real sleeps and vLLM's iteration log."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.fit.iteration_fit import TERMS, TermFit
from calibrate.measure.engine_under_test import EngineFacts
from calibrate.measure.iteration_records import counts_of
from real.users.prompts import load_tokenizer
from sim.engine import Engine, EngineRequest
from sim.fleet import EngineSettings
from sim.spec import EngineSpec, ExpertSpec

FAST = TermFit(terms=dict(zip(TERMS, (1e-3, 5e-6, 0.0, 1e-4, 5e-6, 1e-9), strict=True)), floor_tokens=0, graph_sizes=())


class EngineServer:
    """Fulfils ``calibrate.measure.engine_under_test.EngineUnderTest``; of laptop-16m, as far as its tokenizer goes."""

    def __init__(self, folder: Path, settings: EngineSettings, *, dies_after: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "engine.log"
        self.served_model = "expert"
        self.facts = EngineFacts(
            version="vLLM 0.0.test",
            settings=settings,
            engine=EngineSpec(max_num_seqs=settings.max_num_seqs, enforce_eager=True),
            num_gpu_blocks=settings.num_kv_blocks + 1,
            cores=(),
            command=("engine",),
        )
        self.requests = 0
        self._tokenizer = load_tokenizer(ExpertSpec(model="laptop-16m", gpu="CPU"))
        self._dies_after = dies_after
        self._engine: Engine[EngineRequest] = Engine(settings)
        self._answers: dict[EngineRequest, asyncio.Queue[bool | None]] = {}
        self._iterations = 0
        self._alive = True
        self._loop = asyncio.new_event_loop()
        self._arrived = asyncio.Event()
        self._connections: set[asyncio.StreamWriter] = set()
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        assert listening.wait(20)

    def front_end_cpu_s(self) -> float | None:
        return 1e-3 * self.requests + 1e-4 * self._iterations

    def is_running(self) -> bool:
        return self._alive

    def stop(self) -> None:
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _run(self, listening: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        engine = self._loop.create_task(self._work())
        listening.set()
        self._loop.run_forever()
        self._alive = False
        engine.cancel()
        # Connections that are just being accepted get their tasks, which they cannot once the server is closed; then
        # all sockets are closed, then the tasks end.
        self._loop.run_until_complete(asyncio.sleep(0.05))
        server.close()
        for writer in list(self._connections):
            writer.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _work(self) -> None:
        engine = self._engine
        while True:
            batch = engine.schedule()
            if batch is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            work = np.array([engine.work(batch)], dtype=np.float64)
            took_s = float(FAST.predict_s(work)[0])
            await asyncio.sleep(took_s)
            counts = counts_of(batch)
            running = [*engine.decoding(batch.iteration), *(r for r, _ in batch.chunks if r.last_iteration >= 0)]
            finished = engine.finish_run(1)
            with self.log.open("a") as log:
                log.write(
                    f"(MainProcess pid=1) INFO 11-25 22:46:40 {time.time():.6f} [loggers.py:199] Engine 000: "
                    f"Iteration({self._iterations}): {counts.context_requests} context requests, "
                    f"{counts.context_tokens} context tokens, {counts.generation_requests} generation requests, "
                    f"{counts.generation_tokens} generation tokens, iteration elapsed time: {1e3 * took_s:.2f} ms, "
                    f"CPU KV cache usage: {100 * engine.kv_usage:.1f}%\n"
                )
            self._iterations += 1
            for request in running:
                self._answers[request].put_nowait(True)
            for request in finished:
                self._answers[request].put_nowait(None)
            if self._dies_after is not None and self._iterations >= self._dies_after:
                self._alive = False
                self._loop.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                await self._answer(json.loads(await reader.readexactly(length)), writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        prompt = self._tokenizer.encode(body["prompt"], add_special_tokens=True)
        request = EngineRequest(len(prompt), body["max_tokens"])
        answer = self._answers[request] = asyncio.Queue()
        self.requests += 1
        self._engine.add(request)
        self._arrived.set()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        while await answer.get():
            _chunk(writer, b'data: {"choices":[{"text":"a"}]}\n\n')
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
