"""Time small matrix products with 1 and 2 threads, spinning and sleeping: python -m benchmarks.threads

Run it beside another busy process: that is where spinning threads lose.
"""

import os
import subprocess
import sys

CODE = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
inputs, weights = torch.randn(960, 64), [torch.randn(192, 64) for _ in range(50)]
def measure():
    start = time.perf_counter()
    for _ in range(40):
        for weight in weights:
            torch.nn.functional.gelu(inputs @ weight.T).sum()
    return time.perf_counter() - start
measure()
print(sorted(measure() for _ in range(3))[1])
"""


def measure(threads: int, policy: str) -> float:
    """Return the median seconds in a fresh process; OpenMP reads its policy once, when it is loaded."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables |= {"OMP_NUM_THREADS": str(threads)} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(threads)], env=variables, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    print("| threads | spinning (default) | OMP_WAIT_POLICY=PASSIVE |\n|---|---|---|")
    for threads in (1, 2):
        print(f"| {threads} | {measure(threads, ''):.2f} s | {measure(threads, 'PASSIVE'):.2f} s |", flush=True)
