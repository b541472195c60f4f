"""Tests of the data loaders on files of the genuine format, broken at random.

    pytest worlds/test_hostile_files.py -m "slow or not slow"

Whatever the files hold, either they load and can be played, or one line says which of them is
wrong, and where; within seconds, and without filling the memory. Some cases start from the genuine
files that the tests of WebShop and ALFWorld speak of, and are skipped without them.
"""

import copy
import json
import random
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import alfworld  # noqa: E402
import test_alfworld  # noqa: E402
import test_webshop  # noqa: E402
import webshop  # noqa: E402

from envs import EVAL_SEED  # noqa: E402

# Values that json.dumps cannot write, by what stands for them until it has written the others.
RAW = {"<huge>": "9" * 5000, "<infinite>": "1e400", "<nan>": "NaN", "<unfinished>": "{"}
RAW |= {"<deep>": "[" * 10**5 + "]" * 10**5, "<rather deep>": "[" * 930 + "]" * 930}
ODD = [*RAW, None, True, 0, -1, "", [], {}, [None], [[]], {"": None}, "x" * 300_000, "9" * 5000]
ODD += ["\ud800", "a\n\x85\u2028b", "\0", "[", "$1", "$2 to $1", "$9.9.9", "red"]
BYTES = [b"", b"\xff", b"\xef\xbb\xbf", b"\0", b"{", b"]", b'"', b"\\", b"\r", b"\\ud800", b"-"]


def draw_place(content, rng):
    """A (container, key) in nested lists and dicts: from the top down, mostly to a leaf."""
    while True:
        key = rng.choice([*content] if isinstance(content, dict) else range(len(content)))
        value = content[key]
        if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
            return content, key
        content = value


def edit(text, rng):
    """A text with a word of it lost, doubled, or replaced by another one."""
    words = re.split(r"(\W)", text)
    i, other = rng.randrange(len(words)), rng.choice(words)
    odd = rng.choice(["", "(", ")", "-", "x", "\n", "\ud800", "\0", "9" * 5000])
    words[i : i + 1] = rng.choice([[], [words[i], " ", words[i]], [other], [odd]])
    return "".join(words)


def mutate(content, rng):
    """Change some places of a JSON object, in place."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not content:
            return
        container, key = draw_place(content, rng)
        value = copy.deepcopy(container[key])
        match rng.choice(["odd", "odd", "lost", "moved", "twice", "text", "text", "text"]):
            case "odd":
                container[key] = copy.deepcopy(rng.choice(ODD))
            case "lost":
                del container[key]
            case "moved":
                other, there = draw_place(content, rng)
                other[there] = value
            case "twice" if isinstance(container, list):
                container.insert(0, value)
            case "twice":
                container[f"{key} again"] = value
            case "text" if isinstance(value, str):
                container[key] = edit(value, rng)


def write_broken(path, content, rng):
    """Write a JSON file that is broken, mostly in its values, else in its bytes, or as a file."""
    kind = rng.choice([*range(4), *["values"] * 16])
    if kind == "values":
        mutate(content, rng)
    text = json.dumps(content)
    for stand_in, value in RAW.items():
        text = text.replace(f'"{stand_in}"', value)
    raw = text.encode()
    start, end = sorted(rng.choices(range(len(raw) + 1), k=2))
    match kind:
        case 0:  # a folder, a link to itself, or nothing
            rng.choice([path.mkdir, lambda: path.symlink_to(path), lambda: None])()
            return
        case 1:
            raw = raw[start:end]
        case 2:
            raw = raw[:start] + raw[end:]
        case 3:
            raw = raw[: start // 2] + rng.choice(BYTES) + raw[start // 2 :]
    path.write_bytes(raw)


def files_of(world, is_genuine):
    """Name -> content of a world's data files."""
    if world == "alfworld":
        text = {"grammar": test_alfworld.GRAMMAR, "pddl_problem": test_alfworld.LIT_ROOM}
        files = {"game.tw-pddl": {"pddl_domain": "", **text, "solvable": True}}
        files["traj_data.json"] = {"task_type": "look_at_obj_in_light", "images": [{"low_idx": 0}]}
        if is_genuine:
            folder = test_alfworld.genuine("genuine") / test_alfworld.GENUINE
            files = {name: json.loads((folder / name).read_text()) for name in files}
        return files
    records, notes = webshop.generate_catalogue(8, 0)
    human = {}
    for record in records:
        asked = {"instruction": "a lamp.", "instruction_attributes": ["heavy duty"]}
        human[record["asin"]] = [{**asked, "instruction_options": ["red"]}]
    if is_genuine:
        if not test_webshop.DATA.exists():
            pytest.skip(f"no genuine data: {test_webshop.DATA} is not there")
        human, notes, records = (
            json.loads((test_webshop.DATA / f"items_{name}.json").read_text())
            for name in ("human_ins", "ins_v2_1000", "shuffle_1000")
        )
        records = [record for record in records if record["asin"] in human]
        notes = {record["asin"]: notes[record["asin"]] for record in records}
    names = "items_shuffle.json", "items_ins_v2.json", "items_human_ins.json"
    return dict(zip(names, (records, notes, human), strict=True))


def open_world(world, folder, rng):
    """The environment on the files in a folder, which nothing remembers from before."""
    if world == "webshop":
        webshop.open_shop.cache_clear()
        return webshop.WebShop(str(folder), human_goals=rng.random() < 0.5)
    alfworld.list_games.cache_clear()
    alfworld.load_game.cache_clear()
    return alfworld.AlfWorld(str(folder))


def play(env, rng):
    """Some turns, by the scripted player and at random, all of whose texts can be encoded."""
    for seed in (0, EVAL_SEED):
        texts = [env.reset(seed)[0]]
        for _ in range(4):
            texts += [env.rules(), env.task_key(), env.anchor(), *env.actions()]
            reply = f"<action>{rng.choice(env.actions() or [''])}</action>"
            reply = rng.choice([reply, env.scripted(rng.random(), rng)])
            texts.append(env.step(env.parse(reply)[0])[0])
        assert "".join([*texts, env.scripted_reflection(rng)]).encode()


def peak_memory():
    """The most this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def check_broken(world, is_genuine, folder, num_cases):
    """Break files in so many ways; both outcomes must come up."""
    contents = json.dumps(files_of(world, is_genuine))
    rng, num_played, before = random.Random(f"{world} {is_genuine}"), 0, peak_memory()
    for _ in range(num_cases):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = json.loads(contents)
        broken = rng.choice([*files])
        for name, content in files.items():
            if name == broken:
                write_broken(folder / name, content, rng)
            else:
                (folder / name).write_text(json.dumps(content))
        start = time.process_time()
        try:
            env = open_world(world, folder, rng)
        except ValueError as error:
            line = str(error)
            assert len(line.splitlines()) == 1 and len(line) < 300 and str(folder) in line
        else:
            play(env, rng)
            num_played += 1
        assert time.process_time() - start < 5
    assert 0.2 < num_played / num_cases < 0.8
    assert peak_memory() - before < 5e8


@pytest.mark.parametrize("num_cases", [30, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_genuine", [False, True])
@pytest.mark.parametrize("world", ["webshop", "alfworld"])
def test_broken_files_load_or_are_named(world, is_genuine, num_cases, tmp_path):
    check_broken(world, is_genuine, tmp_path / "data", num_cases)
