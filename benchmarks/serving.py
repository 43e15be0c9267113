"""What a served model does when many people talk to it at once: throughput, waiting, errors, memory.

    python -m benchmarks.serving MODEL [--clients 1,4,16,64,256] [--rate 1,4] [--seconds 30] [--json FILE]
    python -m benchmarks.serving MODEL --clients 16 --seconds 1800 --rows memory --draw memory.html   # is it flat?
    python -m benchmarks.serving http://HOST:8000 --channels 2 ...                         # a server that runs

A checkpoint folder is served by ``audio-llm serve`` for the time of the measurement. *Closed* loops are N clients, each
of which asks again as soon as it was answered; *open* loops are requests that arrive by themselves (a Poisson process),
as many a second as stated, whether or not the server keeps up. Sounds are noise of `--lengths` seconds; one request in
ten is bad in one of the ways of ``BAD`` and has to be refused. *same* sends one sound and one question again and again.

Exit code 1 where something happened that must not: an answer 5xx other than 503, none within `--patience` seconds, a
bad request that was answered, a good one that was refused, a 429 or 503 without ``Retry-After``, or (where `memory` is
watched for four minutes or more, the first of which is left out) growth beyond 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import LAYOUT_OF_COUNT, Waveform, encode

# How a request can be bad, all of which the server has to refuse by 4xx.
BAD = ("not audio", "cut short", "other channels", "no such key", "no such model", "no messages", "not JSON")
QUESTIONS = ("What do you hear?", "On which side is the sound?", "How far away is it, and is anything else heard?")
ALLOWED_GROWTH = 0.05
WARM_UP_SECONDS = 60.0  # after which memory is expected to stay
WATCHED_SECONDS = 240.0  # for which it has to be looked at before anything is said about it


@dataclass
class Answer:
    """One request: what it was, its HTTP status (0: none came), seconds to the first token and to the end."""

    kind: str  # "good" or one of BAD
    status: int
    first: float = 0.0
    whole: float = 0.0
    tokens: int = 0
    retry_after: bool = False


@dataclass
class Row:
    """One line of the table; seconds are percentiles 50 and 99 over good requests that were answered."""

    load: str
    asked: int
    answered: int
    per_second: float
    tokens_per_second: float
    first: tuple[float, float]
    whole: tuple[float, float]
    statuses: dict[str, int]
    memory_mib: tuple[float, float]
    wrong: list[str] = field(default_factory=list)


class Bodies:
    """Bodies of requests, good ones of mixed lengths and one in `bad` of the others."""

    def __init__(self, model: str, channels: int, lengths: Sequence[float], bad: float, tokens: int, seed: int) -> None:
        self._model, self._channels, self._lengths, self._tokens = model, channels, lengths, tokens
        self._bad, self._draw, self._noise = bad, random.Random(seed), np.random.default_rng(seed)
        self._other = 1 if channels != 1 else 2

    def again(self) -> Iterator[tuple[str, bytes]]:
        """The same clip with the same question."""
        body = self._body(self._sound(self._channels), QUESTIONS[0])
        while True:
            yield "good", body

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        while True:
            kind = self._draw.choice(BAD) if self._draw.random() < self._bad else "good"
            yield kind, self._made(kind)

    def _made(self, kind: str) -> bytes:
        question, sound = self._draw.choice(QUESTIONS), self._sound(self._channels)
        if kind == "not audio":
            return self._body(bytes(1000), question)
        if kind == "cut short":
            return self._body(sound[: len(sound) // 2], question)
        if kind == "other channels":
            return self._body(self._sound(self._other), question)
        if kind == "no such key":
            return self._body(sound, question, temprature=0)
        if kind == "no such model":
            return self._body(sound, question, model="none")
        if kind == "no messages":
            return json.dumps({"model": self._model}).encode()
        return b"{" if kind == "not JSON" else self._body(sound, question)

    def _sound(self, channels: int) -> bytes:
        length = int(16000 * self._draw.choice(self._lengths))
        samples = self._noise.normal(size=(channels, length)).clip(-4, 4).astype(np.float32) / 8
        return encode(Waveform(samples, 16000, LAYOUT_OF_COUNT[channels]), "wav")

    def _body(self, sound: bytes, question: str, **more: Any) -> bytes:
        audio = {"data": base64.b64encode(sound).decode("ascii"), "format": "wav"}
        content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": question}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body | more).encode()


async def ask(session: Any, url: str, kind: str, body: bytes, patience: float) -> Answer:
    """Send one request and read its stream to the end."""
    import aiohttp

    begin = time.perf_counter()
    answer = Answer(kind, 0)
    try:
        async with asyncio.timeout(patience), session.post(url, data=body) as reply:
            answer.status = reply.status
            answer.retry_after = "Retry-After" in reply.headers
            async for line in reply.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.status = int(event["error"].get("code") or 500)
                if event.get("choices") and not answer.first:
                    answer.first = time.perf_counter() - begin
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
    except (TimeoutError, aiohttp.ClientError, OSError):
        answer.status = 0
    answer.whole = time.perf_counter() - begin
    return answer


async def closed(session: Any, url: str, bodies: Iterator[tuple[str, bytes]], clients: int, args: Any) -> list[Answer]:
    """`clients` that ask one request after the other; one that is told to come again later does so."""
    end, answers = time.perf_counter() + args.seconds, list[Answer]()

    async def client() -> None:
        while time.perf_counter() < end:
            kind, body = next(bodies)
            answers.append(await ask(session, url, kind, body, args.patience))
            if answers[-1].status in (429, 503):
                await asyncio.sleep(1)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def opened(session: Any, url: str, bodies: Iterator[tuple[str, bytes]], rate: float, args: Any) -> list[Answer]:
    """Requests that arrive `rate` times a second, at exponential distances."""
    draw, end, tasks = random.Random(args.seed), time.perf_counter() + args.seconds, []
    while time.perf_counter() < end:
        kind, body = next(bodies)
        tasks.append(asyncio.create_task(ask(session, url, kind, body, args.patience)))
        await asyncio.sleep(draw.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def faults(answers: Sequence[Answer]) -> list[str]:
    """What happened that must not, a line for each kind with its count."""
    found: Counter[str] = Counter()
    for one in answers:
        busy = one.status in (429, 503)
        if one.status == 0:
            found["no answer"] += 1
        elif busy and not one.retry_after:
            found[f"{one.status} without Retry-After"] += 1
        elif one.status >= 500 and not busy:
            found[f"{one.status}"] += 1
        elif one.kind == "good" and not busy and one.status != 200:
            found[f"a good request: {one.status}"] += 1
        elif one.kind != "good" and one.status == 200:
            found[f"{one.kind}: answered"] += 1
    return [f"{count} x {name}" for name, count in found.items()]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th, in seconds; NaN without any."""
    if not values:
        return float("nan"), float("nan")
    return round(statistics.median(values), 3), round(float(np.percentile(values, 99)), 3)


def row(load: str, answers: Sequence[Answer], seconds: float, memory: Sequence[tuple[float, float]]) -> Row:
    good = [one for one in answers if one.kind == "good" and one.status == 200]
    sizes = [size for _, size in memory] or [0.0]
    return Row(
        load,
        len(answers),
        len(good),
        round(len(good) / seconds, 2),
        round(sum(one.tokens for one in good) / seconds, 1),
        percentiles([one.first for one in good]),
        percentiles([one.whole for one in good]),
        {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())},
        (round(sizes[0], 1), round(sizes[-1], 1)),
        faults(answers),
    )


# ------------------------------------------------------------------------------------------------ the server


@contextmanager
def served(model: str, options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Address and process id of ``audio-llm serve`` for a folder; of a running server, its address and 0."""
    if model.startswith(("http://", "https://")):
        yield model.rstrip("/"), 0
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "audio_llm", "serve", model, "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}", process.pid
        except SystemExit:
            log.seek(0)
            print(log.read()[-2000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def resident(pid: int) -> float:
    """MiB that a process and its descendants hold: proportional set sizes, so that what they share counts once."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(words[1]), []).append(int(status.parent.name))
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        except OSError:
            continue
    return total


@asynccontextmanager
async def watched(pid: int, every: float) -> AsyncIterator[list[tuple[float, float]]]:
    """(seconds, MiB) of the server while the block runs."""
    found: list[tuple[float, float]] = []
    begin = time.perf_counter()

    async def watch() -> None:
        while pid:
            found.append((round(time.perf_counter() - begin, 1), resident(pid)))
            await asyncio.sleep(every)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        yield found
    finally:
        task.cancel()
        if pid:
            found.append((round(time.perf_counter() - begin, 1), resident(pid)))


def growth(memory: Sequence[tuple[float, float]]) -> float:
    """By how much memory grew from the end of the warm-up to the end: medians of the first and the last fifth."""
    later = [size for second, size in memory if second > WARM_UP_SECONDS]
    fifth = max(1, len(later) // 5)
    return statistics.median(later[-fifth:]) / statistics.median(later[:fifth]) - 1 if len(later) >= 10 else 0.0


def ended(pid: int) -> bool:
    """Whether a child has ended that nobody has waited for. Its command line would not tell: it is empty for a moment
    where a program becomes another one, as ``audio-llm serve`` becomes vLLM."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def slope(memory: Sequence[tuple[float, float]]) -> float:
    """MiB an hour by which memory grew after the warm-up: the line of least squares; NaN of fewer than three points."""
    seconds, sizes = np.array([pair for pair in memory if pair[0] > WARM_UP_SECONDS]).reshape(-1, 2).T
    return float(np.polyfit(seconds / 3600, sizes, 1)[0]) if len(seconds) > 2 else float("nan")


def draw(memory: Sequence[tuple[float, float]], path: Path) -> None:
    """The curve of memory as a page of its own, with the line that it may not cross."""
    from eval.figures.charts import lines

    style = (Path(__file__).parents[1] / "eval" / "report" / "report.css").read_text()
    begin = next((size for second, size in memory if second > WARM_UP_SECONDS), memory[0][1])
    seconds, sizes = zip(*memory, strict=True)
    title = "Memory of the server, MiB"
    drawn = lines(title, seconds, sizes, limit=begin * (1 + ALLOWED_GROWTH), unit="second", width=660, height=300)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>{drawn}'
    )


async def wait_for(session: Any, address: str, pid: int, patience: float = 600.0) -> str:
    """The name of the first model, once the server answers."""
    end = time.monotonic() + patience
    while True:
        try:
            async with session.get(f"{address}/v1/models") as reply:
                return str(json.loads(await reply.read())["data"][0]["id"])
        except OSError as error:
            if pid and ended(pid) or time.monotonic() > end:
                raise SystemExit(f"{address}: no server") from error
            await asyncio.sleep(0.5)


async def measure(args: argparse.Namespace, address: str, pid: int) -> tuple[list[Row], list[tuple[float, float]]]:
    import aiohttp

    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    rows, curve = [], list[tuple[float, float]]()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        model, url = await wait_for(session, address, pid), f"{address}/v1/chat/completions"
        bodies = Bodies(model, args.channels, args.lengths, args.bad, args.max_tokens, args.seed)
        await closed(session, url, iter(bodies.again()), 1, argparse.Namespace(seconds=0.1, patience=args.patience))
        plans: list[tuple[str, Any, Iterator[tuple[str, bytes]], float]] = []
        plans += [(f"closed, {n} clients", closed, iter(bodies), n) for n in args.clients if "closed" in args.rows]
        plans += [(f"open, {rate:g} a second", opened, iter(bodies), rate) for rate in args.rate if "open" in args.rows]
        if "same" in args.rows:
            plans += [(f"same clip, {args.clients[0]} clients", closed, bodies.again(), args.clients[0])]
        if "memory" in args.rows:
            plans = [(f"memory, {args.clients[-1]} clients", closed, iter(bodies), args.clients[-1])]
        for name, load, source, size in plans:
            async with watched(pid, max(1.0, args.seconds / 200)) as memory:
                begin = time.perf_counter()
                # Encoding takes the client's time, so that it is done before and the same bodies come again.
                prepared = itertools.cycle(list(itertools.islice(source, args.bodies)))
                begin = time.perf_counter()
                answers = await load(session, url, prepared, size, args)
                took = time.perf_counter() - begin
            rows.append(row(name, answers, took, memory))
            if "memory" in args.rows and args.seconds >= WATCHED_SECONDS and (grew := growth(memory)) > ALLOWED_GROWTH:
                rows[-1].wrong.append(f"memory grew by {grew:.1%}")
            curve = memory
            print(line(rows[-1]), flush=True)
            if "memory" in args.rows and args.seconds >= WATCHED_SECONDS:
                print(f"  after the first minute: {growth(memory):+.2%}, {slope(memory):+.1f} MiB an hour")
    return rows, curve


def line(one: Row) -> str:
    times = f"{one.first[0]:7.2f} {one.first[1]:7.2f}  {one.whole[0]:7.2f} {one.whole[1]:7.2f}"
    statuses = " ".join(f"{status}:{count}" for status, count in one.statuses.items())
    sizes = f"{one.memory_mib[0]:6.0f} {one.memory_mib[1]:6.0f}"
    wrong = "; ".join(one.wrong) or "-"
    return f"{one.load:22s} {one.per_second:7.2f} {one.tokens_per_second:8.1f}  {times}  {sizes}  {statuses}  {wrong}"


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def reals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder, or the address of a running server")
    parser.add_argument("--clients", type=integers, default=[1, 4, 16, 64, 256], help="closed loops (1,4,16,64,256)")
    parser.add_argument("--rate", type=reals, default=[1.0, 4.0], help="open loops: requests a second (1,4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load (30)")
    parser.add_argument("--rows", default="closed,open,same", help="which loads: closed, open, same; or memory")
    parser.add_argument("--channels", type=int, default=2, choices=(1, 2, 4), help="the model's (2)")
    parser.add_argument("--lengths", type=reals, default=[0.5, 1.0, 2.5], help="seconds of the sounds (0.5,1,2.5)")
    parser.add_argument("--bad", type=float, default=0.1, help="share of bad requests (0.1)")
    parser.add_argument("--bodies", type=int, default=200, help="different requests of a load (200)")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest reply (32)")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which no answer is a hang (120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, default=0, help="process whose memory is looked at, of a running server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows and the curve of memory as JSON")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="the curve of memory as an HTML page")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="options of audio-llm serve, in one word")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    head = f"{'load':22s} {'good/s':>7s} {'tokens/s':>8s}  {'first token, s':>15s}  {'whole, s':>15s}  {'MiB':>13s}"
    print(f"{head}  statuses, wrong")
    print(f"{'':22s} {'':7s} {'':8s}  {'p50':>7s} {'p99':>7s}  {'p50':>7s} {'p99':>7s}  {'begin':>6s} {'end':>6s}")
    with served(args.model, args.serve.split()) as (address, pid):
        rows, curve = asyncio.run(measure(args, address, pid or args.pid))
    if args.json:
        told = {"rows": [asdict(one) for one in rows], "memory": curve, "growth": growth(curve)}
        told |= {"slope": slope(curve) if len(curve) and curve[-1][0] > WATCHED_SECONDS else None}
        args.json.write_text(json.dumps(told, indent=1))
    if args.draw and curve:
        draw(curve, args.draw)
    return int(any(one.wrong for one in rows))


if __name__ == "__main__":
    sys.exit(main())
