"""WebShop's build time, memory, search time and steps per second, on one core: generated catalogues, or --data DIR.

python bench/webshop.py                      1000 and 20,000 generated products
python bench/webshop.py --data DIR           the 1000 genuine ones instead of the first
"""

import random
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs import load_module

webshop = load_module(f"{sys.path[0]}/worlds/webshop.py", 0)


def measure(data: str | None, products: int, compact: bool) -> None:
    start = time.perf_counter()
    env = webshop.WebShop(data, products, compact=compact)
    seconds, shop = time.perf_counter() - start, env.shop
    index = shop.index
    print(f"{len(shop.products)} products: ready in {seconds:.2f} s; {len(shop.goals)} goals, ", end="")
    print(f"{shop.ways.count(None)} of them cannot be won; index of {len(index.texts)} postings ", end="")
    print(f"{(index.texts.nbytes + index.saturation.nbytes + index.starts.nbytes + index.idf.nbytes) / 1e6:.1f} MB")

    queries = [goal.text.lower() for goal in random.Random(0).sample(shop.goals, 300)]
    start = time.perf_counter()
    for query in queries:
        shop.find(query)
    print(f"  a search for a whole instruction {(time.perf_counter() - start) / len(queries) * 1e3:.2f} ms", end="")

    rng, actions = random.Random(0), []
    start, spent = time.perf_counter(), 0.0
    for seed in range(1000):
        env.reset(seed)
        done = False
        while not done:
            actions.append(env.parse(env.scripted(0.3, rng))[0])  # not counted: the player's own thinking
            start = time.perf_counter()
            _, _, terminated, truncated, _ = env.step(actions[-1])
            spent += time.perf_counter() - start
            done = terminated or truncated
    print(f", {len(actions) / spent:.0f} steps a second")


if __name__ == "__main__":
    data = sys.argv[sys.argv.index("--data") + 1] if "--data" in sys.argv else None
    measure(data, 1000, compact=data is None)
    webshop.open_shop.cache_clear()
    tracemalloc.start()
    webshop.WebShop(None, 20_000)
    print(f"20000 products: {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB of Python objects and arrays at most")
    tracemalloc.stop()
    webshop.open_shop.cache_clear()
    measure(None, 20_000, compact=True)
