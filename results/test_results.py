"""The README's tables are those of the JSON beside this file."""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
import diversity  # noqa: E402
import follows  # noqa: E402
import gammas  # noqa: E402
import passed  # noqa: E402
import replay  # noqa: E402
import swap  # noqa: E402
import table  # noqa: E402
import teacher  # noqa: E402

import train  # noqa: E402
from envs import make_env  # noqa: E402
from lamer import PastEpisode, Reply, Trial, make_turn, run_trial  # noqa: E402
from policy import Recorder, scripted_trial  # noqa: E402

README = (HERE.parent / "README.md").read_text(encoding="utf-8")


def cells_of(name: str) -> list[str]:
    """The cells of the README's row that begins with this name."""
    [row] = [line for line in README.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip().replace("**", "") for cell in row.strip("| ").split("|")][1:]


@pytest.mark.parametrize(("name", "model"), [("tiny policy", "tiny"), ("SmolLM2-135M", "smollm2")])
def test_lockbox(name, model):
    expected = []
    for kind in ("g0.6-s{}", "g0.6-s{}-swapped", "g0-s{}"):
        seeds = []
        for seed in range(3):
            file = HERE / f"lockbox-{model}-{kind.format(seed)}.json"
            row = json.loads(file.read_text(encoding="utf-8"))
            assert row["num_tasks"] == len(row["tasks"]) == 256
            seeds.append(" / ".join(f"{100 * share:.0f}" for share in row["success"]))
        expected.append(", ".join(seeds))
    assert cells_of(name) == expected


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("warm-started, before RL", "warm-reflection"),
        ("RL: single episodes", "rl-none"),
        ("meta-RL (LaMer)", "meta-reflection"),
        ("the same with its memory swapped", "meta-swapped"),
        ("the same without memory, three", "meta-none"),
    ],
)
def test_minesweeper(name, way):
    found = table.read("minesweeper-tiny")[way]
    assert len(found) == 3, "three seeds"
    assert cells_of(name)[0] == table.success(found)


@pytest.mark.parametrize(
    ("name", "results", "method"),
    [
        ("the player that is imitated", "alfworld-tiny", "novice"),
        ("imitation, before RL | 30", "alfworld-tiny", "warm"),
        ("imitation, then meta-RL", "alfworld-tiny", "meta"),
        ("imitation, then RL of", "alfworld-tiny", "rl"),
        ("without the thought: before RL", "alfworld-tiny_silent", "warm"),
        ("without the thought: meta-RL | 60", "alfworld-tiny_silent", "meta"),
        ("without the thought: RL", "alfworld-tiny_silent", "rl"),
        ("the imitated player", "webshop-tiny", "novice"),
        ("its imitation |", "webshop-tiny", "warm"),
        ("its imitation, then meta-RL", "webshop-tiny", "meta"),
        ("its imitation, then RL", "webshop-tiny", "rl"),
        ("imitation, before RL | 19", "minesweeper-smollm2", "warm"),
        ("meta-RL | 20", "minesweeper-smollm2", "meta"),
        ("RL of single episodes", "minesweeper-smollm2", "rl"),
        ("100 steps of imitation", "alfworld-smollm2", "warm"),
        ("then six of meta-RL", "alfworld-smollm2", "meta"),
        ("then six of RL", "alfworld-smollm2", "rl"),
    ],
)
def test_games(name, results, method):
    found, expected = table.read(results), []
    for memory in ("reflection", "swapped", "none"):
        by_seed = found.get(f"{method}-{memory}")
        expected.append(table.success(by_seed).partition(" (")[0] if by_seed else "")
    [row] = [line for line in README.splitlines() if line.startswith(f"| {name}")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == expected


def test_first_episodes():
    found = table.read("swap-minesweeper-tiny")
    for name, other in (("the policy before RL", "start"), ("the scripted player", "scripted")):
        assert cells_of(name) == [
            table.success(found[other]),
            table.compare(found["itself"], found[other]),
        ]
    assert table.success(found["itself"]) == cells_of("the trained policy itself")[0]


def test_gamma_traj_on_minesweeper():
    passed = json.loads((HERE / "passed-s0.json").read_text())["policies"]
    keys = [f"env-g{gamma}" for gamma in ("0", ".3", ".6", ".9", "1")]
    success, mines = [], []
    for key in (*keys, "success-g.9", "success-g1"):
        row = json.loads((HERE / f"sweep-{key}-s0.json").read_text())
        success.append(" / ".join(f"{100 * share:.0f}" for share in row["success"]))
        mines.append(f"{100 * passed[f'runs/sweep/sweep-{key}-s0']['opened_mine']:.0f}%")
    assert cells_of("success |") == success
    assert cells_of("opened a sure mine") == mines


def test_gamma_traj_differences():
    """First episodes of 1 against 0, and of only wins against all that is earned; third ones."""

    def wins(key, episode):
        row = json.loads((HERE / f"sweep-{key}-s0.json").read_text())
        return table.wins_so_far([task["won_in"] for task in row["tasks"]], episode)

    text = " ".join(README.split())
    for words, ours, other, episode in (
        ("to 35 at 1 ({} against 0)", "env-g1", "env-g0", 1),
        ("are gone (at 1, {})", "success-g1", "env-g1", 1),
        ("as often as with 0.6 ({} for 0)", "env-g0", "env-g.6", 3),
    ):
        found = table.compare({"0": wins(ours, episode)}, {"0": wins(other, episode)})
        assert words.format(found.partition(" (")[0]) in text, found


def test_further_than_trained():
    text = " ".join(README.split())
    for what, ends, words in (
        ("eight", (0, 1, 2, 7), "meta-RL comes to {}, with another task's notes to {}, RL to {},"),
        ("mines", (0, 1, 2), "meta-RL wins {}, with another's notes {}, RL {}."),
    ):
        found = []
        for method in ("meta", "swapped", "rl"):
            row = json.loads((HERE / f"further-{what}-{method}-s2.json").read_text())
            found.append(" / ".join(f"{100 * row['success'][k]:.0f}" for k in ends))
        assert words.format(*found) in text


def test_the_figure_shows_means_and_intervals(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    import figure

    drawn, errorbar = {}, axes.errorbar

    def record(self, x, mean, bars, **style):
        drawn[style["label"]] = mean, bars
        return errorbar(self, x, mean, bars, **style)

    monkeypatch.setattr(axes, "errorbar", record)
    figure.main([str(tmp_path / "figure.svg"), "MineSweeper", "minesweeper-tiny"])
    assert "MineSweeper" in (tmp_path / "figure.svg").read_text()
    mean, bars = drawn["RL, three attempts"]
    assert " / ".join(f"{share:.0f}" for share in mean) == cells_of("RL: single")[0].split(" (")[0]
    wins = [each[:, -1] for each in table.read("minesweeper-tiny")["rl-none"].values()]
    low, high = 100 * table.interval(wins)
    assert low < mean[-1] < high
    assert bars[:, -1] == pytest.approx([mean[-1] - low, high - mean[-1]])


def test_differences_by_hand():
    """Ten tasks: ours wins all, the other none, then half; draws keep to their seed."""
    wins, none, half = np.ones((10, 2)), np.zeros((10, 2)), np.array([[0, 1], [0, 0]] * 5)
    assert table.compare({"0": wins}, {"0": none}) == "+100.0 [+100.0, +100.0] (+100.0)"
    text = table.compare({"0": wins, "1": wins, "2": wins}, {"0": none, "1": half})
    assert text.startswith("+75.0 [") and text.endswith("(+100.0, +50.0)")
    assert table.success({"0": half, "1": wins}) == "50 / 75 (50..100)"


@pytest.mark.parametrize(("name", "gain"), [("alfworld", 5), ("minesweeper", 3), ("webshop", 3)])
def test_the_imitated_player_needs_its_own_notes(name, gain, tmp_path, capsys):
    """Else its pupil could not learn to use them: tasks won by own notes and not by others'."""
    teacher.main([name, f"{tmp_path}/", "96"])
    won = {}
    for memory in ("reflection", "swapped", "none"):
        row = json.loads((tmp_path / f"{memory}.json").read_text())
        won[memory] = sum(task["won_in"] is not None for task in row["tasks"])
    assert won["reflection"] >= won["swapped"] + gain, won
    assert won["reflection"] >= won["none"] + gain, won


class Text(Recorder):
    """A chat that gives tokens back as text."""

    head, tail = (), (0,)

    def decode(self, ids):
        return "prompt"


def played(won):
    """(config, a trial of MineSweeper of more than one episode that ends so)."""
    options = dict(size=4, mines=2, turns=9)
    config = train.make_config(env="minesweeper", device="cpu", env_options=options)
    for seed in range(100):
        env = make_env("minesweeper", **options)
        trial = scripted_trial(env, seed, 3, Text(), 0.3, random.Random(seed), style="compact")
        if len(trial.past) > 0 and (trial.won_in is not None) == won:
            return config, trial
    raise AssertionError


@pytest.mark.parametrize("won", [True, False])
def test_a_replay_shows_what_happened(won):
    config, trial = played(won)
    data = replay.as_data(config, trial, Text())
    assert (data["won"] is not None) == won and len(data["turns"]) == len(trial.turns)
    for now, then in zip(data["turns"], data["turns"][1:], strict=False):
        assert now["after"] == then["before"]
    for shown, turn in zip(data["turns"], trial.turns, strict=True):
        is_play = turn.phase == "play"
        notes = [past.reflection for past in trial.past[: turn.episode]] if is_play else []
        assert shown["notes"] == notes and shown["reply"] == turn.reply
    last = data["turns"][-1]
    assert last["after"] != last["before"], "the end of the last episode"


HOSTILE = "</script><script>document.title = 'run'</script><img src=x onerror=alert(1)>&amp;\u2028"
# What a person does on the page, and what then stands there.
BY_HAND = """<script>
const all = "#before, #reply, #after, #notes, #prompt, dd";
const shown = () => [...document.querySelectorAll(all)].map((each) => each.textContent);
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true}));
const steps = {start: [location.hash, shown()]};
for (const key of ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft"]) {
  press(key);
  steps[key] = [location.hash, document.getElementById("reply").textContent];
}
document.querySelectorAll("#turns button")[2].click();
steps.click = location.hash;
steps.wide = document.documentElement.scrollWidth > innerWidth;
steps.title = document.title;
document.body.innerHTML = "";
document.body.textContent = "FOUND" + JSON.stringify(steps) + "END";
</script>"""


@pytest.mark.slow
def test_a_replay_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium")
    config, trial = played(won=True)
    for turn in trial.turns:
        turn.reply = f"reply of episode {turn.episode + 1}"
    trials = [replay.as_data(config, trial, Text()) for _ in range(2)]
    for name in ("before", "reply", "after", "prompt", "action"):
        trials[0]["turns"][0][name] = HOSTILE
    trials[0]["turns"][0]["notes"] = [HOSTILE]
    file = tmp_path / "replay.html"
    file.write_text(replay.page(HOSTILE, trials) + BY_HAND, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --window-size=390,800 --virtual-time-budget=2000"
    profile = f"--user-data-dir={tmp_path}/profile"
    command = [browser, *flags.split(), profile, "--dump-dom", file.as_uri()]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    text = re.search("FOUND(.*)END", text, flags=re.S)[1]
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["title"].strip() == HOSTILE.strip()
    assert found["start"][0] == "#1.1" and found["start"][1].count(HOSTILE) == 5
    assert f"Episode 1: {HOSTILE}" in found["start"][1]
    assert found["ArrowRight"] == ["#1.2", "reply of episode 1"]
    assert found["ArrowDown"][0] == "#2.1", "it is the last: down again stays"
    assert found["ArrowUp"] == ["#1.1", HOSTILE] and found["ArrowLeft"][0] == "#1.1"
    assert found["click"] == "#1.3" and not found["wide"]


def test_lockbox_over_gamma_traj():
    assert gammas.table([*gammas.points()]) in README


def test_speed():
    found = json.loads((HERE / "bench.json").read_text(encoding="utf-8"))["results"]
    ratios = {}
    for row in [row for each in found for row in each["rows"] if "setting" in row]:
        for name in ("ours_over_plain", "ours_over_other", "over_ours"):
            if name in row:
                key = row["setting"], row.get("sampler", name)
                ratios.setdefault(key, []).append(f"{row[name]:.1f}")
    for setting, update in (("paper", "prompts in full"), ("tiny", "the tiny policy on")):
        [cell] = cells_of(f"update, {update}")
        plain, other = (" / ".join(ratios[setting, f"ours_over_{x}"]) for x in ("plain", "other"))
        assert cell == f"plain padded rows {plain}, our own code before the tree {other}"
    for setting, rollout in (("long", "a Llama"), ("tiny", "the tiny policy on")):
        [cell] = cells_of(f"rollout, {rollout}")
        batch, lock_step = (ratios[setting, x][0] for x in ("generate_batch", "lock-step"))
        assert cell == f"transformers' `generate_batch` {batch}, lock-step `generate` {lock_step}"


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("imitation", "-warm"),
        ("meta-RL", "-meta"),
        ("without the thought: imitation", "_silent-warm"),
        ("without the thought: meta-RL", "_silent-meta"),
    ],
)
def test_notes_of_alfworld(name, run):
    row = json.loads((HERE / f"follows-alfworld-tiny{run}-s0.json").read_text())
    episodes, went, won, _ = row["right"].values()
    assert f"| {name} | {episodes} | {went} | {won} |\n" in README
    assert row["wrong"]["episodes"] == (run == "_silent-meta"), "all but one are right"


@pytest.mark.parametrize(
    ("name", "ours", "other"),
    [
        ("meta-RL minus RL", "meta-reflection", "rl-none"),
        ("own memory minus swapped |", "meta-reflection", "meta-swapped"),
        ("swapped memory minus none", "meta-swapped", "meta-none"),
        ("swapped memory minus RL", "meta-swapped", "rl-none"),
        ("own memory minus swapped, before RL", "warm-reflection", "warm-swapped"),
    ],
)
def test_differences_on_alfworld(name, ours, other):
    found = table.read("alfworld-tiny")
    difference, each = table.compare(found[ours], found[other]).rstrip(")").split(" (")
    assert cells_of(f"ALFWorld: {name}") == [difference, each]


def test_diversity_by_hand():
    _, trial = played(won=False)
    actions = [turn.action for turn in trial.episodes_played()[0]]
    [(shown, count)] = diversity.trajectories([trial, trial]).items()
    assert shown == " > ".join(actions[:3]) and count == 2
    assert diversity.normalized_entropy({"a": 8}) == 0
    assert diversity.normalized_entropy(dict.fromkeys("abcd", 1)) == pytest.approx(1)
    assert diversity.normalized_entropy({"a": 2, "b": 2}) == pytest.approx(1 / 2)


def test_who_goes_where_the_notes_say():
    env = make_env("alfworld", tasks="pick", receptacles=5, objects=5)
    env.reset(0)
    names, [thing, *_] = env.state.game.names, env.wanted(env.state.game.goal)
    [place] = [f[2] for f in env.state.game.start if f[:2] == ("inreceptacle", thing)]
    elsewhere = next(r for r in env.state.game.receptacles if r != place)
    kind = names[thing].split()[0]
    right, wrong = (f"{kind} {names[where]}" for where in (place, elsewhere))
    there, away = f"go to {names[place]}", f"go to {names[elsewhere]}"

    def trial(actions, notes, won_in=None):
        turns = [make_turn([1], [2]) for _ in actions]
        for episode, (turn, action) in enumerate(zip(turns, actions, strict=True)):
            turn.episode, turn.action = episode, action
        past = [PastEpisode([], note) for note in notes]
        return Trial(0, 3, turns=turns, past=past, won_in=won_in)

    trials = [
        trial(["look", there], [f"seen {wrong} {right}"], 1),
        trial(["look", away, there], [right, f"sock 7 {names[place]}"]),
        trial(["look", away], [right], 1),
        trial(["look", away], [wrong], 1),
        trial(["look", away, "look"], ["", wrong], 2),
        trial([there], [right], 0),
    ]
    found = follows.places(trials, env)
    assert [*found["right"].values()] == [4, 2, 1, 1]
    assert [*found["wrong"].values()] == [2, 1, 1, 1]
    assert (found["said"], found["of which true"]) == (7, 4), "a sock is no thing here"

    env = make_env("alfworld", tasks="look", receptacles=5, objects=5)
    env.reset(0)
    names = env.state.game.names
    lies = [fact[1:] for fact in env.state.game.start if fact[0] == "inreceptacle"]
    [place] = [names[place] for thing, place in lies if "desklamp" in names[thing]]
    found = follows.places([trial(["look", "look"], [f"desklamp {place}"])], env)
    assert found["right"]["episodes"] == 0 and found["of which true"] == 1, "lamps come last"


def test_what_is_certain_on_a_board():
    board = ["?", "?", "1", ".", "1", "1", "1", "."] + ["."] * 8
    assert passed.certain(board, 4, mines=1) == ({0}, {1})
    assert passed.certain(["?"] * 4, 2, mines=1) == (set(), set())
    env = make_env("minesweeper", size=4, mines=2, turns=15)
    for seed in range(40):  # who only opens what is certain never loses; what is a mine is one
        env.reset(seed)
        while not env.won:
            safe, mines = passed.certain(env.shown, 4, 2)
            hidden = {i for i, number in enumerate(env.numbers) if number == "*"}
            assert mines <= hidden and not safe & hidden
            if not safe:
                break
            env.step((min(safe) // 4 + 1, min(safe) % 4 + 1))


def test_what_is_passed_up():
    """Of three turns the first opens a safe cell, the last a mine; between them a reply is void."""
    env = make_env("minesweeper", size=4, mines=1)
    for seed in range(100):
        env.reset(seed)
        safe, mines = passed.certain(env.shown, 4, 1)
        if len(safe) > 1 and mines:
            break
    cells = [f"<action>({i // 4 + 1}, {i % 4 + 1})</action>" for i in (min(safe), min(mines))]
    turns = [replace(make_turn([1], [2]), reply=reply) for reply in (cells[0], "what?", cells[1])]
    row = passed.passed_up(env, [Trial(seed, 1, turns=turns)])
    assert row == {"turns": 3, "opened_safe": 1 / 3, "opened_mine": 1 / 3}


class Stub:
    """Plays every prompt with one text."""

    def __init__(self, config, text):
        self.config, self.text, self.asked = config, text, []

    def trials(self, seeds):
        make = partial(make_env, "minesweeper", **self.config.env_options)
        return [run_trial(make(), seed, 3, Text(), style="compact") for seed in seeds]

    def play(self, trials):
        return [self.play_one(trial) for trial in trials]

    def play_one(self, trial):
        try:
            prompt = next(trial)
            while True:
                self.asked.append(prompt.phase)
                prompt = trial.send(Reply([1], [0.0], self.text))
        except StopIteration as stop:
            return stop.value


def test_a_swapped_first_episode_is_played_on():
    """By whoever plays on, from the reflection on it; what is solved stays as it is."""
    config, trial = played(won=False)
    _, other = played(won=True)
    solved = replace(other, won_in=0, seed=77)
    player = Stub(config, "<remark>here</remark><action>(1, 1)</action>")
    first, second = swap.continued(player, [trial, solved])
    assert second is solved and player.asked[0] == "reflect"
    begun = [turn for turn in trial.turns if turn.episode == 0 and turn.phase == "play"]
    assert first.turns[: len(begun)] == [
        replace(turn, prompt_ids=mine.prompt_ids)
        for turn, mine in zip(begun, first.turns, strict=False)
    ]
    assert first.past[0].reflection == "here" and first.past[0].records == trial.past[0].records
    assert swap.summary([first, solved], 3)["won_in"] == [first.won_in, 0]
    assert swap.summary([solved, solved], 3)["success"] == [1, 1, 1]
