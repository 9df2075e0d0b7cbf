"""One card and two: data-parallel LoRA of hf_mlx beside TRL and a bare torch DDP loop, all in one run.

First the numbers, in float32, on rows of uneven length: 2 processes of 8 rows against one process of 16, and against
one of 8 that accumulates two; beside them TRL under torchrun on the same rows. Then the speed, in ``--dtype``: the same
script on one card and on all. The model is built at random from a configuration, so nothing is downloaded.

    python benchmarks/ranks.py --json ranks.json                  # two NVIDIA cards, nccl; about 5 minutes
    python benchmarks/ranks.py --preset tiny --shape 2x32 --dtype float32 --steps 3     # a CPU: the ring, and gloo

`hf_mlx` and `trl` are MLXSFTTrainer and SFTTrainer with the same script; `torch` is a loop of PEFT, DDP and a fused
AdamW that logs nothing. `apart` (``--peers hf_mlx apart``) is hf_mlx on all cards at the same time, in processes that
know nothing of each other: what is lost beyond it is lost to exchanging. Each peer has processes of its own. NVLink
multicast is off for all (``NCCL_NVLS_ENABLE=0``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_step import PRESETS, versions
from sft_step_peer import SEVEN, Clock, MLXMemory, TorchMemory, losses, make_model, make_trainer, random_rows

PEERS = ("hf_mlx", "trl", "torch")
APART = "apart"
#: Variable with the number of a process that runs apart.
ALONE = "APART"
#: Where float32 matrix products of other shapes are other kernels, they are this close.
CLOSE = 1e-4
CHECKED = ("loss", "grad_norm", "entropy")


def main() -> int:
    """Run the parts, print the table; the exit status is 1 where numbers differ or a part is missing."""
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[3]))
        return 0
    if sys.argv[1:2] == ["--apart"]:
        return start_apart(int(sys.argv[2]), sys.argv[3:])
    options = parse()
    bench = Bench(options)
    try:
        bench.run()
    finally:
        status = bench.report()
    return status


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="llama-1b")
    parser.add_argument("--shape", default="8x1024", metavar="ROWSxTOKENS", help="batch of one card")
    parser.add_argument("--check-shape", default="8x128", metavar="ROWSxTOKENS", help="batch of the float32 comparison")
    parser.add_argument("--dtype", choices=("float32", "autocast", "bfloat16"), default="bfloat16", help="of the speed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "ring"), help="nccl where there is CUDA, else ring")
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, APART), default=list(PEERS))
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--check-steps", type=int, default=4, help="of the comparison; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them: tracing, compiling, caches")
    parser.add_argument(
        "--limit", type=float, default=345, help="seconds in all; what is not begun by then is left out"
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure, with versions and device")
    return parser.parse_args()


class Bench:
    """The parts of a run, one after the other, and what they gave."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.cuda = has_cuda()
        self.backend = options.backend or ("nccl" if self.cuda else "ring")
        #: By peer, processes and part, such as ("hf_mlx", 2, "speed"): what each process wrote.
        self.made: dict[tuple[str, int, str], list[dict[str, Any]]] = {}

    def say(self, line: str) -> None:
        """A line of progress, at once."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", flush=True)

    def run(self) -> None:
        """Every part of every peer."""
        o = self.options
        with tempfile.TemporaryDirectory() as folder:
            self.job = vars(o) | {
                "folder": folder, "model": PRESETS[o.preset], "on": False, "accumulate": 1, "clip": 1.0,
                "cuda": self.cuda, "together": o.processes,
                # Without it, torchrun's processes on a machine without a card train alone.
                "use_cpu": not self.cuda,
            }  # fmt: skip
            self.launch("make-model", 1, ["model"])
            for peer in o.peers:
                for processes in counts(peer, o.processes):
                    check = ["check", "accumulated"] if processes == 1 else ["check"]
                    if peer in ("torch", APART) or (peer == "trl" and processes == 1) or not o.check_steps:
                        check = []
                    # MLX's float32 products are TF32 on CUDA unless its environment says otherwise.
                    if peer == "hf_mlx" and self.cuda and check:
                        self.launch(peer, processes, check, MLX_ENABLE_TF32="0")
                        check = []
                    self.launch(peer, processes, [*check, "speed"])

    def launch(self, peer: str, processes: int, parts: list[str], **variables: str) -> None:
        """Start the processes of one peer, and keep what they write."""
        folder, name = Path(self.job["folder"]), f"{peer}, {processes} process(es), {' and '.join(parts)}"
        # One that hangs must leave the others their time.
        left = min(self.options.limit - (time.monotonic() - self.began), self.options.limit / 2)
        if left < 10:
            self.say(f"{name}: left out, no time")
            return
        self.say(f"{name} …")
        out = folder / f"{peer}-{processes}"
        job = self.job | {"peer": peer, "processes": 1 if peer == APART else processes, "parts": parts}
        worker = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job), str(out)]
        quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "NCCL_NVLS_ENABLE": "0"}
        environment = os.environ | quiet | variables
        if processes == 1 and self.cuda:
            # torch would spread one process over all the cards it sees.
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if not self.cuda:
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with (folder / "said.txt").open("w+") as said:
            started = subprocess.Popen(
                [*self.launcher(peer, processes), *worker], env=environment, stdout=said, stderr=said,
                # Left open and never written: mlx.launch would read an empty input without rest.
                stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            written = {
                part: [out.with_name(f"{out.name}.{rank}.{part}") for rank in range(processes)] for part in parts
            }
            try:
                status: Any = wait(started, left, [file for files in written.values() for file in files])
            finally:
                end(started)
            for part, files in written.items():
                found = [json.loads(file.read_text()) for file in files if file.exists()]
                if len(found) == processes:
                    self.made[peer, processes, part] = found
                    self.say(f"  {part}: {describe(found[0])}")
            if status:
                said.seek(0)
                self.say(f"  stopped, exit status {status}:")
                print("".join(said.readlines()[-60:]), flush=True)

    def launcher(self, peer: str, processes: int) -> list[str]:
        """The words before the command of each process."""
        if processes == 1:
            return []
        if peer == APART:
            return [sys.executable, str(Path(__file__).resolve()), "--apart", str(processes)]
        port = str(free_port())
        if peer == "hf_mlx":
            ports = ["--nccl-port" if self.backend == "nccl" else "--starting-port", port]
            launcher = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
            return [*launcher, "-n", str(processes), "--backend", self.backend, *ports, "--"]
        words = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", port, "--no-python"]
        return [sys.executable, "-m", "torch.distributed.run", *words]

    def report(self) -> int:
        """Print the comparison and the table, keep them; 1 where something is not as it should be."""
        text, status = checks(self.made, self.options.processes)
        table, complete = speeds(self.made, self.options)
        print("\n".join([*text, "", *table]), flush=True)
        if self.options.json:
            Path(self.options.json).parent.mkdir(parents=True, exist_ok=True)
            results = [
                {"peer": peer, "processes": processes, "part": part, "ranks": ranks}
                for (peer, processes, part), ranks in self.made.items()
            ]
            report = {"versions": versions(), "options": vars(self.options), "backend": self.backend}
            report |= {"seconds": time.monotonic() - self.began, "results": results}
            Path(self.options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
        self.say("done")
        return int(status or not complete)


def describe(found: dict[str, Any]) -> str:
    """A part's result in a few words."""
    if "seconds" in found:
        return f"{1e3 * found['seconds']:.1f} ms/step, {found['peak'] / 2**30:.1f} GiB"
    return "loss " + " ".join(f"{entry['loss']:.4f}" for entry in found["log"]) if "log" in found else "done"


def checks(made: dict[tuple[str, int, str], list[dict[str, Any]]], processes: int) -> tuple[list[str], bool]:
    """The largest relative differences to several processes of ours, and whether one is too large."""
    lines, bad = ["", f"largest relative difference to {processes} processes of hf_mlx, float32:"], False
    ours = made.get(("hf_mlx", processes, "check"))
    if ours is None:
        return [*lines, "  not measured"], True
    others = {
        "one process of as many rows": ("hf_mlx", 1, "check"),
        "one process that accumulates": ("hf_mlx", 1, "accumulated"),
        f"TRL under torchrun, {processes} processes": ("trl", processes, "check"),
    }
    for name, key in others.items():
        if key not in made:
            continue
        pairs = list(zip(made[key][0]["log"], ours[0]["log"], strict=True))
        worst = {v: max(abs(b[v] / a[v] - 1) for a, b in pairs) for v in CHECKED}
        bad |= not max(worst.values()) <= CLOSE
        lines.append(f"  {name:36} " + "  ".join(f"{v} {far:.1e}" for v, far in worst.items()))
    same = len({rank["weights"] for rank in ours}) == 1
    lines.append(f"  trained weights on all ranks: {'bitwise equal' if same else 'NOT EQUAL'}")
    return lines, bad or not same


def speeds(
    made: dict[tuple[str, int, str], list[dict[str, Any]]], options: argparse.Namespace
) -> tuple[list[str], bool]:
    """The table of tokens per second, and whether it is complete."""
    rows, length = map(int, options.shape.split("x"))
    lines = [
        f"{options.preset}, LoRA r={options.rank} on all seven projections, {options.dtype}, {options.shape} a card, "
        f"mean of {options.steps} steps",
        f"{'peer':8} {'cards':>5} {'ms/step':>8} {'tokens/s':>9} {'x one card':>10} {'of ideal':>8} "
        f"{'hf_mlx over it':>14} {'GiB a card':>10}",
    ]
    rate: dict[tuple[str, int], float] = {}
    for peer in options.peers:
        for processes in counts(peer, options.processes):
            found = made.get((peer, processes, "speed"))
            if found is None:
                lines.append(f"{peer:8} {processes:5} not measured")
                continue
            # The slowest says when all have done it.
            seconds = max(rank["seconds"] for rank in found)
            rate[peer, processes] = processes * rows * length / seconds
            gain = rate[peer, processes] / rate.get(("hf_mlx" if peer == APART else peer, 1), float("nan"))
            ahead = rate.get(("hf_mlx", processes), float("nan")) / rate[peer, processes]
            lines.append(
                f"{peer:8} {processes:5} {1e3 * seconds:8.1f} {rate[peer, processes]:9.0f} {gain:10.2f} "
                f"{gain / processes:8.2f} {ahead:14.2f} {max(rank['peak'] for rank in found) / 2**30:10.2f}"
            )
    return lines, len(rate) == sum(len(counts(peer, options.processes)) for peer in options.peers)


def counts(peer: str, processes: int) -> tuple[int, ...]:
    """How many processes a peer is run with, one after the other."""
    return (processes,) if peer == APART else (1, processes)


def start_apart(processes: int, command: list[str]) -> int:
    """Start ``command`` on each card at the same time; the largest exit status."""
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    cards = cards or [str(number) for number in range(processes)]
    started = [
        subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": cards[number], ALONE: str(number)})
        for number in range(processes)
    ]
    return max(abs(process.wait()) for process in started)


def has_cuda() -> bool:
    """Whether there is an NVIDIA card, without starting its driver in this process."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait(started: subprocess.Popen[bytes], seconds: float, files: list[Path]) -> int | str:
    """The exit status; 0 also for a launcher that does not end within 20 s of the last of ``files``."""
    deadline, complete = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        if (status := started.poll()) is not None:
            return status
        if complete is None and all(file.exists() for file in files):
            complete = time.monotonic()
        if complete is not None and time.monotonic() - complete > 20:
            return 0
        time.sleep(0.2)
    return f"none after {seconds:.0f} s"


def end(started: subprocess.Popen[bytes]) -> None:
    """End a launcher and its processes, gently at first: torchrun ends what it has started."""
    for sent, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        if started.poll() is None:
            started.send_signal(sent) if sent == signal.SIGTERM else os.killpg(started.pid, sent)
            try:
                started.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)


def work(job: dict[str, Any], out: Path) -> None:
    """One process: each part of the job, written as soon as it is there."""
    rank = int(os.environ.get("MLX_RANK", os.environ.get("RANK", os.environ.get(ALONE, "0"))))
    if ALONE in os.environ:
        # Runs that know nothing of each other keep out of each other's folder.
        job["output_dir"] = f"{job['folder']}/out-{rank}"
    for part in job["parts"]:
        result = {"make-model": build}.get(job["peer"], train_bare if job["peer"] == "torch" else train)(job, part)
        written = out.with_name(f"{out.name}.{rank}.{part}")
        written.with_suffix(".new").write_text(json.dumps(result), encoding="utf-8")
        written.with_suffix(".new").rename(written)


def build(job: dict[str, Any], part: str) -> dict[str, Any]:
    """The model of random weights."""
    make_model(job)
    return {}


def train(job: dict[str, Any], part: str) -> dict[str, Any]:
    """A run of one of the trainers; its speed, or every logged value and a digest of what was trained."""
    if job["peer"] == "trl":
        from trl import SFTTrainer as trainer_class

        memory: Any = TorchMemory()
    else:
        from hf_mlx import MLXSFTTrainer as trainer_class

        memory = MLXMemory()
    if part == "speed":
        clock = Clock(job, memory)
        rows, tokens = map(int, job["shape"].split("x"))
        trainer = make_trainer(trainer_class, job, rows, tokens, clock)
        trainer.train()
        return clock.result() | {"losses": losses(trainer)}
    rows, tokens = map(int, job["check_shape"].split("x"))
    job = job | {"dtype": "float32", "uneven": True, "logging_steps": 1, "warm_up": 0, "steps": job["check_steps"]}
    # One process reads at once, or one after the other, what all of them read.
    apart = job["together"] if job["processes"] == 1 else 1
    if part == "accumulated":
        job["accumulate"] = apart
    else:
        rows *= apart
    trainer = make_trainer(trainer_class, job, rows, tokens, Clock(job, memory))
    trainer.train()
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    log = [{name: entry[name] for name in CHECKED} for entry in trainer.state.log_history if "loss" in entry]
    return {"log": log, "weights": digest.hexdigest()}


def train_bare(job: dict[str, Any], part: str) -> dict[str, Any]:
    """The speed of PEFT and DDP in a loop that does nothing else: no log, no entropy, norms left on the device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    rank, together, cuda = int(os.environ.get("LOCAL_RANK", "0")), job["processes"] > 1, job["cuda"]
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if together:
        torch.distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    lowered = job["dtype"] != "float32"
    dtype = torch.bfloat16 if job["dtype"] == "bfloat16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    lora = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=SEVEN, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if together:
        model = DistributedDataParallel(model, device_ids=[rank] if cuda else None)
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=cuda)
    rows, tokens = map(int, job["shape"].split("x"))
    clock = Clock(job, TorchMemory())
    ids = torch.tensor(random_rows(job, rows * job["processes"] * clock.last, tokens), device=device)
    for batch in ids.view(clock.last, job["processes"], rows, tokens)[:, rank]:
        with torch.autocast(device.type, torch.bfloat16, enabled=lowered):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    result = clock.result() | {"losses": [loss.item()]}
    if together:
        torch.distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    sys.exit(main())
