"""WebShop's build time, memory, search time and steps per second, on one core.

python bench/webshop.py                      1000 and 20,000 generated products
python bench/webshop.py --data DIR           the 1000 genuine ones instead of the first
"""

import random
import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from envs import load_module  # noqa: E402

webshop = load_module(f"{ROOT}/worlds/webshop.py", 0)


def measure(data: str | None, products: int, compact: bool) -> None:
    """Open a shop, search, and play 1000 episodes; print what each took."""
    start = time.perf_counter()
    env = webshop.WebShop(data, products, compact=compact, shops=1)
    seconds, shop = time.perf_counter() - start, env.shop
    arrays = (shop.index.texts, shop.index.saturation, shop.index.starts, shop.index.idf)
    print(
        f"{len(shop.products)} products: ready in {seconds:.2f} s; {len(shop.goals)} goals, "
        f"{shop.ways.count(None)} of them cannot be won; index of {len(shop.index.texts)} postings "
        f"{sum(array.nbytes for array in arrays) / 1e6:.1f} MB"
    )

    queries = [goal.text.lower() for goal in random.Random(0).sample(shop.goals, 300)]
    start = time.perf_counter()
    for query in queries:
        shop.find(query)
    milliseconds = 1000 * (time.perf_counter() - start) / len(queries)

    rng, num_steps, spent = random.Random(0), 0, 0.0
    for seed in range(1000):
        env.reset(seed)
        done = False
        while not done:
            action, _ = env.parse(env.scripted(0.3, rng))
            start = time.perf_counter()  # the player's own thinking is not counted
            _, _, terminated, truncated, _ = env.step(action)
            spent += time.perf_counter() - start
            num_steps += 1
            done = terminated or truncated
    print(
        f"  a search for a whole instruction {milliseconds:.2f} ms, "
        f"{num_steps / spent:.0f} steps a second"
    )


if __name__ == "__main__":
    data = sys.argv[sys.argv.index("--data") + 1] if "--data" in sys.argv else None
    measure(data, 1000, compact=data is None)
    webshop.open_shop.cache_clear()
    tracemalloc.start()
    webshop.WebShop(None, 20_000)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    print(f"20000 products: {peak:.0f} MB of Python objects and arrays at most")
    tracemalloc.stop()
    webshop.open_shop.cache_clear()
    measure(None, 20_000, compact=True)
