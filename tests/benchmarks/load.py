"""A load client of its own process: streams chat answers at a fixed concurrency and prints one JSON line.

    python -m tests.benchmarks.load --url http://127.0.0.1:8000 --token-file F --model M --concurrency 8 --requests 64

Only loopback. On two cores a busy server starves an ordinary client, and a whole stream then arrives in one read; so
`run_load` starts it under the real-time scheduler (`chrt -f 1`) where the machine allows it, for every server alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

QUESTION = "What does a transfer abroad cost?"


@dataclass(frozen=True, slots=True)
class Load:
    """What one run measured. Times in milliseconds."""

    requests: int
    errors: int
    wall_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    total_p50_ms: float
    tokens: int  # completion tokens by the server's own count
    chunks: int
    gap_p50_ms: float  # between chunks of one answer; a chunk may hold several tokens
    gap_p99_ms: float
    refusals: list[int]  # statuses

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def chunks_per_s(self) -> float:
        return self.chunks / self.wall_s


def run_load(
    url: str,
    token_file: str,
    model: str,
    concurrency: int,
    requests: int,
    max_tokens: int = 64,
    *,
    stream: bool = True,
    workload: Path | None = None,
) -> Load:
    """Run the client in its own process and return what it measured.

    `workload`: a line a request, each `{"text": …, "max_tokens": …}`, asked in turn; without it, one question for all.
    """
    command = [sys.executable, "-m", "tests.benchmarks.load", "--url", url, "--token-file", token_file]
    command += ["--model", model, "--concurrency", str(concurrency), "--requests", str(requests)]
    command += ["--max-tokens", str(max_tokens), *([] if stream else ["--no-stream"])]
    command += ["--workload", str(workload)] if workload is not None else []
    if shutil.which("chrt") and subprocess.run(["chrt", "-f", "1", "true"], capture_output=True).returncode == 0:
        command = ["chrt", "-f", "1", *command]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Load(**json.loads(output))


@dataclass(slots=True)
class _One:
    ok: bool = False
    status: int = 0
    ttft: float = 0.0
    total: float = 0.0
    tokens: int = 0
    chunks: int = 0
    gaps: list[float] = field(default_factory=list)


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> _One:
    one, start = _One(), time.perf_counter()
    last = start
    async with session.post(url, json=body) as response:
        one.status = response.status
        if response.status != 200:
            return one
        if not body["stream"]:
            one.tokens = (await response.json())["usage"]["completion_tokens"]
            one.ttft = one.total = time.perf_counter() - start
            one.ok = True
            return one
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                one.tokens = event["usage"]["completion_tokens"]
            if any(choice["delta"].get("content") for choice in event["choices"]):
                now = time.perf_counter()
                if one.chunks:
                    one.gaps.append(now - last)
                else:
                    one.ttft = now - start
                one.chunks, last = one.chunks + 1, now
        one.total, one.ok = time.perf_counter() - start, True
    return one


async def _run(arguments: argparse.Namespace) -> Load:
    headers = {"authorization": f"Bearer {arguments.token}"}
    url = f"{arguments.url}/v1/chat/completions"
    body: dict[str, object] = {
        "model": arguments.model,
        "stream": arguments.stream,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    if arguments.stream:
        body["stream_options"] = {"include_usage": True}
    workload = [{"text": QUESTION, "max_tokens": arguments.max_tokens}]
    if arguments.workload is not None:
        workload = [json.loads(line) for line in arguments.workload.read_text().splitlines()]
    results: list[_One] = []
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        for _ in range(2):
            await _ask(session, url, body)  # not counted
        turns = iter(range(arguments.requests))

        async def work() -> None:
            for turn in turns:
                one = workload[turn % len(workload)]
                asked = {"messages": [{"role": "user", "content": one["text"]}], "max_tokens": one["max_tokens"]}
                results.append(await _ask(session, url, body | asked))

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(arguments.concurrency)))
        wall = time.perf_counter() - start
    return _summary(results, wall)


def _summary(results: list[_One], wall: float) -> Load:
    good = [one for one in results if one.ok]
    ttfts = [one.ttft * 1e3 for one in good]
    gaps = [gap * 1e3 for one in good for gap in one.gaps]
    return Load(
        requests=len(good),
        errors=len(results) - len(good),
        wall_s=wall,
        ttft_p50_ms=_quantile(ttfts, 0.5),
        ttft_p99_ms=_quantile(ttfts, 0.99),
        total_p50_ms=_quantile([one.total * 1e3 for one in good], 0.5),
        tokens=sum(one.tokens for one in good),
        chunks=sum(one.chunks for one in good),
        gap_p50_ms=_quantile(gaps, 0.5),
        gap_p99_ms=_quantile(gaps, 0.99),
        refusals=[one.status for one in results if not one.ok],
    )


def _quantile(values: list[float], share: float) -> float:
    """Return the least of `values` that at least this share of them does not exceed; NaN of none."""
    ordered = sorted(values) or [float("nan")]
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--token-file", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--no-stream", dest="stream", action="store_false")
    parser.add_argument("--workload", type=Path)
    arguments = parser.parse_args()
    if urlsplit(arguments.url).hostname not in ("127.0.0.1", "localhost"):
        parser.error("only loopback")
    arguments.token = Path(arguments.token_file).read_text()
    print(json.dumps(asdict(asyncio.run(_run(arguments)))))


if __name__ == "__main__":
    main()
