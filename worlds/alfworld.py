"""ALFWorld, written from scratch: household tasks in text, in genuine games or rooms made here.

1. The simulator: `parse_problem` reads the PDDL problem of a game into a `Game` (what never
   changes); a `State` of it lists its admissible commands, carries them out and knows when the
   problem's own goal holds. Texts, lists and ends equal the original engine's (TextWorld, ALFWorld
   0.4.2), as recorded cases show, at a thousand times its speed.
2. `make_game`: kitchens, living rooms, bedrooms and bathrooms of genuine character, as a `Game`.
3. `AlfWorld`: LaMer's episode around it (ten turns, 10 points at the winning one), and a scripted
   player, whose expert takes the shortest way and whose novice searches and reads its memory.

    env = AlfWorld()                          # generated games; AlfWorld(data=DIR): genuine ones
    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step("go to cabinet 1")
    python train.py --env alfworld

The rules are those of alfred.pddl and alfred.twl2 in the folder `alfworld/data` of
github.com/alfworld/alfworld. What can be where, and which task goes with which room, are facts
condensed from ALFRED and ALFWorld (NOTICE.alfworld).
"""

import json
import os
import random
import re
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple

from envs import EVAL_SEED, WIN_REWARD, Env, Records, derive_seed


def table(text: str) -> dict[str, list[str]]:
    """A table from text.

    table("a b: x y; c: z") == {"a": ["x", "y"], "b": ["x", "y"], "c": ["z"]}
    """
    rows = {}
    for row in text.split(";"):
        keys, _, words = row.partition(":")
        for key in keys.split():
            rows[key] = words.split()
    return rows


# ----------------------------------------------------------------------- reading a problem

# A ground fact, ("inreceptacle", "mug_bar_1", "cabinet_bar_2"), or an action, ("open", "...")
Atom = tuple[str, ...]

# The domain's predicates of one argument and of two, in lower case, as the engine turns whatever it
# reads. The first line of each is what play changes.
UNARY_CHANGING = "opened isclean ishot iscool issliced istoggled"
UNARY = """openable ison cleanable heatable coolable sliceable toggleable pickupable
    isreceptacleobject isreceptacleobjectfull moveable full checked examined holdsany
    holdsanyreceptacleobject"""
BINARY_CHANGING = "atlocation objectatlocation inreceptacle holds"
BINARY = """receptacleatlocation inreceptacleobject receptacletype objecttype cancontain
    wasinreceptacle"""
CHANGING = {*UNARY_CHANGING.split(), *BINARY_CHANGING.split()}
NUM_ARGUMENTS = dict.fromkeys([*UNARY_CHANGING.split(), *UNARY.split()], 1)
NUM_ARGUMENTS |= dict.fromkeys([*BINARY_CHANGING.split(), *BINARY.split()], 2)
MAX_NAMES = 1_000  # a genuine game declares some 300; from each place one can go to all others


class Form(list):
    """A list of the Lisp syntax, with the line it starts on."""

    line = 1

    def __str__(self) -> str:
        text = f"({' '.join(map(str, self))})"
        return text if len(text) <= 80 else text[:77] + "..."


def read_form(text: str) -> Form:
    """All lists of a text, nested: "(a (b c))" -> [["a", ["b", "c"]]]."""
    stack = [Form()]
    for line, row in enumerate(text.lower().split("\n"), start=1):
        code = row.partition(";")[0]  # the rest is a comment
        for token in code.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                stack.append(Form())
                stack[-1].line = line
                if len(stack) > 60:
                    raise ValueError(f"line {line}: parentheses are nested too deeply")
            elif token != ")":
                stack[-1].append(token)
            elif len(stack) == 1:
                raise ValueError(f"line {line}: one closing parenthesis too many")
            else:
                form = stack.pop()
                stack[-1].append(form)
    if len(stack) > 1:
        raise ValueError(f"line {stack[-1].line}: the parenthesis that opens here is never closed")
    return stack[0]


def typed_names(names: Form) -> list[tuple[str, str]]:
    """(name, type) pairs of a typed list.

    ["?a", "?b", "-", "agent"] -> [("?a", "agent"), ("?b", "agent")]
    """
    pairs, untyped = [], []
    for before, token in zip(["", *names], names, strict=False):
        if not isinstance(token, str):
            raise ValueError(f"line {names.line}: a list where a name is due in {names}")
        if before == "-":
            pairs += [(name, token) for name in untyped]
            untyped = []
        elif token != "-":
            untyped.append(token)
    if untyped:
        raise ValueError(f"line {names.line}: {untyped[0][:60]} has no type")
    return pairs


def read_atom(form: Any) -> Atom:
    """A fact or condition, checked against the domain."""
    is_flat = isinstance(form, Form) and all(isinstance(part, str) for part in form)
    atom = tuple(form) if is_flat else ()
    if not atom or NUM_ARGUMENTS.get(atom[0]) != len(atom) - 1:
        line, text = getattr(form, "line", 1), str(form)[:80]
        problem = "unknown predicate, or one with another number of arguments"
        raise ValueError(f"line {line}: {problem}: {text}")
    return atom


def flatten_goal(
    form: Any, scope: dict[str, str], variables: dict[str, str], conditions: list[Atom]
) -> None:
    """Collect a goal of nested `and`, `exists` and `not (= ..)`.

    It becomes `variables` with their types, and `conditions` on them. `scope` maps the names in
    force at this place to variables.
    """
    match form:
        case ["and", _, *_]:
            for part in form[1:]:
                flatten_goal(part, scope, variables, conditions)
            return
        case ["exists", Form() as names, body]:
            scope = dict(scope)
            for name, kind in typed_names(names):
                # Numbered, as the same name may stand in two places for two things.
                scope[name] = f"{name} {len(variables)}"
                variables[scope[name]] = kind
            flatten_goal(body, scope, variables, conditions)
            return
        case ["not", ["=", str() as x, str() as y]]:
            atom = ("!=", x, y)
        case _:
            atom = read_atom(form)
    conditions.append(tuple(scope.get(name, name) for name in atom))


class Game:
    """A game: tables of what never changes in play, the facts true at the start, and the goal.

    The goal is a list of ways to win; each is the set of changeable facts that must hold together.
    Lists of things follow the order of their raw ids, as the engine's do.
    """

    def __init__(
        self,
        types: dict[str, str],
        facts: Iterable[Atom],
        goal: Form,
        task: str,
        task_type: str,
        old: bool = False,  # the older dialect, see load_game
    ):
        self.task, self.task_type, self.old, self.types = task, task_type, old, types
        self.static = set(facts)
        rows = defaultdict(list)  # predicate -> the arguments it holds for
        for predicate, *arguments in sorted(self.static):
            rows[predicate].append(arguments)

        self.agent = next(name for name, kind in types.items() if kind == "agent")
        self.names = shown_names({name for fact in self.static for name in fact[1:]})
        self.place = dict(rows["receptacleatlocation"])  # receptacle -> where one uses it
        self.receptacles = sorted(self.place)
        self.at: dict[str, list[str]] = {}  # place -> the receptacles used there
        for r in self.receptacles:
            self.at.setdefault(self.place[r], []).append(r)

        kinds = dict(rows["objecttype"] + rows["receptacletype"])
        self.kind = {name: kind.removesuffix("type") for name, kind in kinds.items()}
        takers = defaultdict(set)  # type of object -> types of receptacle that take it
        for receptacle_type, object_type in rows["cancontain"]:
            takers[object_type].add(receptacle_type)
        self.fits: dict[str, set[str]] = {}  # object -> receptacles that take it
        for o, kind in rows["objecttype"]:
            self.fits[o] = {r for r in self.receptacles if kinds.get(r) in takers[kind]}
        self.openable = {name for (name,) in rows["openable"]}
        self.portable = {name for (name,) in rows["pickupable"]}
        self.sliceable = [name for (name,) in rows["sliceable"]]
        self.inner = rows["inreceptacleobject"]

        self.start = {fact for fact in self.static if fact[0] in CHANGING}
        self.static = {fact for fact in self.static if not self.can_change(fact)}
        self.goal = self.ground(goal)
        self.travel = {}  # place -> the ways from there
        for place in [*self.at, next(fact[2] for fact in self.start if fact[0] == "atlocation")]:
            self.travel[place] = [("go", r) for r in self.receptacles if self.place[r] != place]
        self.said: dict[Atom, str] = {}

    def can_change(self, fact: Atom) -> bool:
        """Only what can be carried changes its receptacle: a lamp on a desk is furniture."""
        if fact[0] == "inreceptacle":
            return fact[1] in self.portable
        return fact[0] in CHANGING

    def ground(self, goal: Form) -> list[frozenset[Atom]]:
        """Every assignment of the goal's variables that the unchanging facts allow.

        Each as what is left to be achieved.
        """
        variables, conditions = {}, []
        flatten_goal(goal, {}, variables, conditions)
        if len(variables) > 20 or len(conditions) > 50:  # a genuine goal has 6 and 8
            raise ValueError(f"line {goal.line}: the goal has too many variables or conditions")
        known = {*variables, *self.types, *self.types.values()}
        used = [name for condition in conditions for name in condition[1:]]
        for name in [*used, *variables.values()]:
            if name not in known:
                problem = f"the goal names {name[:60]}, which is not declared"
                raise ValueError(f"line {goal.line}: {problem}")

        # Bind one variable after the other. A condition is looked at once its last variable is
        # bound (at the start, for "", if it has none), so that wrong assignments go early.
        order = ["", *variables]
        rows: list[tuple[dict[str, str], frozenset[Atom]]] = [({}, frozenset())]  # (bound, needed)
        for i, variable in enumerate(order):
            values = [""]
            if variable:
                kind = variables[variable]
                values = [name for name in self.names if self.types.get(name) == kind]
            if len(rows) * len(values) > 100_000:
                raise ValueError(f"line {goal.line}: the goal has too many variables")
            due = []
            for condition in conditions:
                last = max(order.index(name) if name in variables else 0 for name in condition)
                if last == i:
                    due.append(condition)
            before, rows = rows, []
            for bound, needed in before:
                for value in values:
                    binding = bound | {variable: value}
                    facts = self.needed(due, binding)
                    if facts is not None:
                        rows.append((binding, needed | facts))
        return list(dict.fromkeys(needed for _, needed in rows))

    def needed(self, conditions: list[Atom], binding: dict[str, str]) -> set[Atom] | None:
        """The changeable facts among these conditions; None if another does not hold."""
        facts = set()
        for condition in conditions:
            atom = tuple(binding.get(name, name) for name in condition)
            if self.can_change(atom):
                facts.add(atom)
            elif atom not in self.static and (atom[0] != "!=" or atom[1] == atom[2]):
                return None
        return facts

    def say(self, action: Atom) -> str:
        """An action as the command a player types."""
        if action not in self.said:
            verb, *ids = action
            start, link = COMMANDS.get(verb, (verb, "with"))
            if self.old and verb == "move":
                start, link = "put", "in/on"
            things = f" {link} ".join(self.names[i] for i in ids)
            self.said[action] = f"{start} {things}".strip()
        return self.said[action]


def shown_names(ids: Iterable[str]) -> dict[str, str]:
    """Raw id -> shown name.

    Within a class numbers fall as ids rise: of two cabinets, the first is `cabinet 2`.
    """
    names, counts = {}, defaultdict(int)
    for name in sorted(ids, reverse=True):
        kind = name.partition("_bar_")[0]
        if "basin" in name:
            kind += "basin"
        counts[kind] += 1
        names[name] = f"{kind} {counts[kind]}" if "_bar_" in name else name
    return names


def parse_problem(
    text: str, task: str, task_type: str, old: bool = False, source: str = "problem"
) -> Game:
    """The game of a PDDL problem and its task sentence; ValueError names `source` and the line."""
    try:
        f"{text}{task}".encode()  # JSON may hold half of a surrogate pair, which raises ValueError
        forms = read_form(text)
        if len(forms) != 1 or forms[0][:1] != ["define"]:
            raise ValueError("line 1: a problem is one list (define (problem ..) ..)")
        sections = {}
        for part in forms[0]:
            if isinstance(part, Form) and part and isinstance(part[0], str):
                sections[part[0]] = part
        objects, init = sections.get(":objects", Form()), sections.get(":init", Form())
        goal = sections.get(":goal", Form())

        del objects[:1]  # the heading; in place, which keeps the form's line
        types = dict(typed_names(objects))
        if len(types) > MAX_NAMES:
            raise ValueError(f"line {objects.line}: {len(types):,} names are too many for a game")
        agents = [name for name, kind in types.items() if kind == "agent"]
        if len(agents) != 1:
            problem = f"{len(agents)} agents, {' '.join(agents)[:60]}; only one can play"
            raise ValueError(f"line {objects.line}: {problem}")
        facts = []
        for form in init[1:]:
            if form[:1] == ["="]:  # distances and costs, which no text game uses
                continue
            facts.append(read_atom(form))
            for name in form[1:]:
                if name not in types:
                    raise ValueError(f"line {form.line}: {name[:60]} in {form} is not declared")
        if [fact[1] for fact in facts if fact[0] == "atlocation"] != agents:
            raise ValueError(f"line {init.line}: the agent must be at exactly one place")
        if len(goal) != 2 or len(goal[1]) < 2:
            raise ValueError(f"line {goal.line}: the goal is empty")
        return Game(types, facts, goal[1], task, task_type, old)
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from None


# --------------------------------------------------------------------------- the simulator

# Verb: how its command begins, and what links its two things; others: "verb x", "verb x with y".
COMMANDS = {"go": ("go to", ""), "take": ("take", "from"), "move": ("move", "to")}
# Verb: which objects can be treated so, what they become, where.
TREATMENTS = table("""
    clean: cleanable isclean sinkbasin;
    heat: heatable ishot microwave;
    cool: coolable iscool fridge
""")
EFFECTS = {  # verb: what its object becomes, what it ceases to be, feedback
    "open": ("opened", None, "You open the {}. "),
    "close": (None, "opened", "You close the {}."),
    "use": ("istoggled", None, "You turn on the {}."),
    "slice": ("issliced", None, "You sliced the {} with the {}."),
    "clean": ("isclean", None, "You clean the {} using the {}."),
    "heat": ("ishot", "iscool", "You heat the {} using the {}."),
    "cool": ("iscool", "ishot", "You cool the {} using the {}."),
}
HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


class State:
    """A game being played. `facts` is the truth, the other fields repeat parts of it for speed.

    Beside the domain's facts there is ("notin", o, r), read by `look`, for an object taken out of r
    and not put back.
    """

    def __init__(self, game: Game):
        self.game, self.facts = game, set(game.start)
        self.contents = {r: [] for r in game.receptacles}
        for o, r in sorted(fact[1:] for fact in game.start if fact[0] == "inreceptacle"):
            if r in self.contents:
                self.contents[r].append(o)
        self.place = next(fact[2] for fact in game.start if fact[0] == "atlocation")
        self.here = game.at.get(self.place, [])  # the receptacles at this place
        held = [fact[2] for fact in sorted(game.start) if fact[0] == "holds"]
        self.held = held[0] if held else None

    def copy(self) -> "State":
        other = State.__new__(State)
        other.__dict__.update(self.__dict__)
        other.facts = set(self.facts)
        other.contents = {r: list(objects) for r, objects in self.contents.items()}
        return other

    @property
    def won(self) -> bool:
        return any(way <= self.facts for way in self.game.goal)

    def is_accessible(self, r: str) -> bool:
        return r not in self.game.openable or ("opened", r) in self.facts

    def actions(self) -> Iterator[Atom]:
        """Whatever may be done now, in no particular order and perhaps twice."""
        game, facts, held = self.game, self.facts, self.held
        yield ("look",)
        yield ("inventory",)
        if not game.old:
            yield ("help",)
        yield from game.travel[self.place]
        for r in self.here:
            yield "examine", r
            if r in game.openable:
                yield ("close" if ("opened", r) in facts else "open"), r
            for o in self.contents[r]:  # of a closed receptacle, too
                if ("toggleable", o) in game.static:
                    yield "use", o
            if not self.is_accessible(r):
                continue
            if held is None:
                yield from (("take", o, r) for o in self.contents[r] if o in game.portable)
            elif r in game.fits.get(held, ()):
                yield "move", held, r
        if held is None:
            return
        yield "examine", held
        for verb, (ability, _, tool) in TREATMENTS.items():
            if (ability, held) in game.static:
                yield from ((verb, held, r) for r in self.here if game.kind.get(r) == tool)
        if game.kind.get(held) in ("knife", "butterknife"):
            for o in game.sliceable:
                if ("objectatlocation", o, self.place) in facts:
                    yield "slice", o, held

    def commands(self) -> dict[str, Atom]:
        """The admissible commands and what they mean."""
        say, said = self.game.say, self.game.said
        return {said.get(action) or say(action): action for action in self.actions()}

    def apply(self, action: Atom) -> str:
        """Carry out an action that is allowed and return the feedback."""
        game, facts, held = self.game, self.facts, self.held
        verb, *ids = action
        x = ids[0] if ids else None
        y = ids[1] if len(ids) > 1 else None
        a, b = game.names.get(x), game.names.get(y)
        match verb:
            case "look":
                return self.look()
            case "inventory":
                if held is None:
                    return "You are not carrying anything."
                return f"You are carrying: a {game.names[held]}."
            case "help":
                return HELP
            case "go":
                facts.discard(("atlocation", game.agent, self.place))
                self.place = game.place[x]
                self.here = game.at[self.place]
                facts.add(("atlocation", game.agent, self.place))
                arrival = game.names[self.place] if game.old else a
                return f"You arrive at {arrival}. {self.describe(x)}"
            case "take":
                facts -= {("inreceptacle", x, y), ("objectatlocation", x, self.place)}
                facts |= {("holds", game.agent, x), ("notin", x, y)}
                self.contents[y].remove(x)
                self.held = x
                return f"You pick up the {a} from the {b}."
            case "move":
                facts -= {("holds", game.agent, x), ("notin", x, y)}
                facts |= {("inreceptacle", x, y), ("objectatlocation", x, self.place)}
                if x not in self.contents[y]:  # it can be, having lain in two receptacles
                    insort(self.contents[y], x)
                self.held = None
                if game.old:
                    return f"You put the {a} in/on the {b}."
                return f"You move the {a} to the {b}."
            case "examine":
                return self.describe(x) if x in self.contents else self.inspect(x)
        gained, lost, feedback = EFFECTS[verb]
        facts.discard((lost, x))
        if gained is not None:
            facts.add((gained, x))
        text = feedback.format(a, b)
        return text + self.describe(x) if verb == "open" else text

    def intro(self) -> str:
        """The first observation: the room and the task."""
        room = self.look()
        if not self.here:  # only this once is the room listed from its middle
            room = room.replace("nothing", self.listing(self.game.receptacles))
        return (
            f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {self.game.task}."
        )

    def listing(self, ids: Iterable[str], article: str = "a ") -> str:
        """Two mugs give "a mug 2, and a mug 1"; none "nothing"."""
        names = [article + self.game.names[i] for i in ids]
        if not names:
            return "nothing"
        if len(names) == 1:
            return names[0]
        return ", ".join(names[:-1]) + f", and {names[-1]}"

    def look(self) -> str:
        if not self.here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        # The engine lists what was carried from one receptacle of this place to another, once for
        # each receptacle it left.
        around = []
        for o in self.game.fits:
            if ("objectatlocation", o, self.place) in self.facts:
                around += [o for r in self.here if ("notin", o, r) in self.facts]
        facing = self.listing(self.here, article="")
        return f"You are facing the {facing}. Next to it, you see {self.listing(around)}."

    def describe(self, r: str) -> str:
        """What a receptacle shows."""
        name = self.game.names[r]
        if not self.is_accessible(r):
            return f"The {name} is closed."
        objects = self.listing(self.contents[r])
        if r in self.game.openable:
            return f"The {name} is open. In it, you see {objects}."
        return f"On the {name}, you see {objects}."

    def inspect(self, o: str) -> str:
        """What a held object shows."""
        game, name = self.game, self.game.names[o]
        if ("isreceptacleobject", o) in game.static:
            inside = [i for i, outside in game.inner if outside == o]
            return f"This is a normal {name}. In it, you see {self.listing(inside)}."
        is_sliced = ("issliced", o) in self.facts
        states = []
        if ("ishot", o) in self.facts:
            states.append("hot")
        elif ("iscool", o) in self.facts:
            states.append("cool")
        if ("isclean", o) in self.facts:
            states.append("clean")
        if states:
            words = " and ".join(states)
            if is_sliced:
                words += " sliced"
            elif words == "cool":
                words = "cold"
            return f"This is a {words} {name}."
        if ("istoggled", o) in self.facts and ("toggleable", o) in game.static:
            return f"This {name} is on."
        if is_sliced and o in game.sliceable:
            return f"This is a sliced {name}."
        return f"There's nothing special about {name}."


# --------------------------------------------------------------------------- genuine games

MAX_BYTES = 5_000_000  # a game file has some hundred kB; far larger ones are something else


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes is more than any game file has")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("line 1: not a JSON object")
        return data
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and JSON are ValueErrors
        raise ValueError(f"{path}: {error}") from None


@lru_cache(maxsize=256)
def load_game(path: str, task_type: str) -> Game:
    """The game of a `game.tw-pddl`; the task type stands in the `traj_data.json` beside it.

    There are two dialects, of the releases json_2.1.1 ("put x in/on y") and json_2.1.3 ("move x to
    y"); the grammar in the file tells which.
    """
    data = read_json(Path(path))
    grammar, problem = data.get("grammar"), data.get("pddl_problem")
    task = None
    if isinstance(grammar, str) and isinstance(problem, str):
        task = re.search(r'Your task is to: (.{,500}?)\."', grammar)
    if task is None:
        lacking = "no sentence 'Your task is to: ...' in its grammar, or no pddl_problem"
        raise ValueError(f"{path}: {lacking}")
    old = "move {o} to {r}" not in grammar
    return parse_problem(problem, task[1], task_type, old, source=f"{path}: pddl_problem")


@lru_cache(maxsize=16)
def list_games(folder: str, types: tuple[str, ...]) -> list[tuple[str, str]]:
    """(game file, task type) of all games below a folder, each read once and found sound.

    Like alfworld/agents/environment/alfred_tw_env.py it passes over trials without a game file,
    unsolvable ones, movable receptacles and slicing.
    """
    games, skipped = [], "no traj_data.json anywhere"
    for root, _, files in sorted(os.walk(folder)):
        game, trajectory = Path(root, "game.tw-pddl"), Path(root, "traj_data.json")
        inside = os.path.relpath(root, folder)
        is_trial = game.name in files or trajectory.name in files
        if not is_trial or "movable" in inside or "Sliced" in inside:
            continue
        if trajectory.name not in files:
            raise ValueError(f"{trajectory}: missing, though there is a {game.name}")
        if game.name not in files:
            skipped = f"{game} is missing"
            continue
        if read_json(game).get("solvable") is not True:
            skipped = f"{game} is not marked as solvable"
            continue
        task_type = read_json(trajectory).get("task_type")
        if task_type not in types:
            skipped = f"{trajectory} has task type {task_type!r:.60}"
            continue
        load_game(str(game), task_type)
        games.append((str(game), task_type))
    if not games:
        raise ValueError(f"{folder}: no game of the wanted tasks: {skipped}")
    return games


# ------------------------------------------------------------------------- generated games

FOOD = "apple bread egg lettuce potato tomato"
CUTLERY = "butterknife fork knife ladle spatula spoon"
CROCKERY, POTS, BOTTLES = "bowl cup mug plate", "kettle pan pot", "glassbottle winebottle"
SHAKERS, SMALL = "peppershaker saltshaker", "cd cellphone creditcard keychain watch"
DECOR, PAPER = "statue vase", "book newspaper pen pencil"
WASHED = "apple egg lettuce potato tomato cloth dishsponge soapbar"
BATH_BUT_CANDLE = "cloth dishsponge handtowel soapbar soapbottle spraybottle tissuebox toiletpaper"
BATH = f"candle {BATH_BUT_CANDLE}"
DRESSER = f"""{CROCKERY} {BOTTLES} {SMALL} {DECOR} {PAPER} alarmclock basketball box candle cloth
    laptop remotecontrol spraybottle tennisracket tissuebox toiletpaper wateringcan desklamp"""
# Which receptacle takes which objects: ALFRED's relation (alfworld/gen/constants.py), for the
# objects that occur here, and where lamps stand.
CONTAINS = table(f"""
    coffeetable countertop diningtable sidetable: {DRESSER} {FOOD} {CUTLERY} {POTS} {SHAKERS} {BATH}
        baseballbat;
    armchair ottoman sofa: basketball book box cellphone cloth creditcard keychain laptop newspaper
        pillow remotecontrol;
    coffeemachine: mug; handtowelholder: handtowel; laundryhamper: cloth; stoveburner: {POTS};
    toaster: nothing; toiletpaperhanger: toiletpaper; towelholder: towel; tvstand: tissuebox;
    bathtubbasin: cloth dishsponge handtowel soapbar;
    bed: baseballbat basketball book cellphone laptop newspaper pillow tennisracket;
    cabinet: {BATH} {CROCKERY} {BOTTLES} {POTS} {SHAKERS} book box cd ladle newspaper plunger vase
        wateringcan;
    cart: {BATH} mug plunger statue vase;
    desk: {DRESSER} soapbottle;
    drawer: {BATH} {CUTLERY} {SHAKERS} {SMALL} {PAPER} remotecontrol wateringcan;
    dresser: {DRESSER};
    fridge: {FOOD} {CROCKERY} {BOTTLES} pan pot;
    garbagecan: {FOOD} {BATH_BUT_CANDLE} cd newspaper pen pencil winebottle;
    microwave: {CROCKERY} apple bread egg potato tomato glassbottle;
    safe: {SMALL} {DECOR};
    shelf: {BATH} {CROCKERY} {BOTTLES} {SHAKERS} {SMALL} {DECOR} {PAPER} alarmclock box desklamp
        kettle pot remotecontrol wateringcan;
    sinkbasin: {CUTLERY} {CROCKERY} {POTS} {WASHED} glassbottle handtowel;
    toilet: {BATH} newspaper
""")
ABILITIES = table(f"""
    heatable: apple bread cup egg mug plate potato tomato;
    coolable: {FOOD} {CROCKERY} pan pot winebottle;
    cleanable: {CUTLERY} {CROCKERY} {POTS} {WASHED};
    sliceable: {FOOD};
    isreceptacleobject: {CROCKERY} box pan pot
""")
# Receptacles with the least and most pieces of each.
FURNITURE = table("""
    kitchen: cabinet 3-9 coffeemachine 1-1 countertop 1-3 diningtable 0-1 drawer 2-7 fridge 1-1
        garbagecan 1-1 microwave 1-1 shelf 0-2 sidetable 0-1 sinkbasin 1-1 stoveburner 2-4
        toaster 1-1;
    livingroom: armchair 1-2 cabinet 0-4 coffeetable 1-2 diningtable 0-1 drawer 1-6 dresser 0-1
        garbagecan 1-1 ottoman 0-1 safe 0-1 shelf 0-6 sidetable 1-3 sofa 1-2 tvstand 0-1;
    bedroom: armchair 0-2 bed 1-1 cabinet 0-2 desk 1-2 drawer 2-8 dresser 0-1 garbagecan 1-1
        laundryhamper 0-1 safe 0-1 shelf 1-5 sidetable 1-2;
    bathroom: bathtubbasin 0-1 cabinet 2-5 cart 0-1 countertop 1-2 drawer 0-5 garbagecan 1-1
        handtowelholder 1-2 shelf 0-2 sidetable 0-1 sinkbasin 1-2 toilet 1-1 toiletpaperhanger 1-1
        towelholder 1-1
""")
# Objects, with ? those not always there.
OBJECTS = table(f"""
    kitchen: {FOOD} {CROCKERY} {SHAKERS} butterknife dishsponge fork knife pan pot soapbottle
        spatula spoon glassbottle? winebottle? statue? vase? kettle? ladle? cellphone? creditcard?;
    livingroom: box creditcard keychain laptop newspaper pillow remotecontrol statue book?
        cellphone? pen? pencil? plate? tissuebox? vase? watch? wateringcan?;
    bedroom: alarmclock book cd cellphone creditcard keychain laptop pen pencil pillow baseballbat?
        basketball? bowl? box? cloth? mug? statue? tennisracket? tissuebox?;
    bathroom: candle cloth handtowel plunger soapbar soapbottle spraybottle toiletpaper towel
        dishsponge? tissuebox?
""")
OPENABLE = {"cabinet", "drawer", "fridge", "microwave", "safe"}
TABLES = "coffeetable countertop diningtable sidetable desk dresser bed sofa"  # for most things
NUM_SCENES = 30  # per kind of room
NUM_UNSEEN = 4  # the last ones are never trained in (ALFWorld: 4 scenes in all)

# Kinds of task: name in game files; rooms; two ways to say it. {o} is the kind of object, {r} of
# receptacle or lamp.
TASK_ROWS = {
    "pick": "pick_and_place_simple; kitchen livingroom bedroom bathroom; "
    "put a {o} in {r}; put some {o} on {r}",
    "look": "look_at_obj_in_light; bedroom livingroom; "
    "look at {o} under the {r}; examine the {o} with the {r}",
    "clean": "pick_clean_then_place_in_recep; kitchen bathroom; "
    "put a clean {o} in {r}; clean some {o} and put it in {r}",
    "heat": "pick_heat_then_place_in_recep; kitchen; "
    "put a hot {o} in {r}; heat some {o} and put it in {r}",
    "cool": "pick_cool_then_place_in_recep; kitchen; "
    "put a cool {o} in {r}; cool some {o} and put it in {r}",
    "pick2": "pick_two_obj_and_place; kitchen livingroom bedroom bathroom; "
    "put two {o} in {r}; find two {o} and put them in {r}",
}
TASKS = {name: row.split("; ") for name, row in TASK_ROWS.items()}
PLACED = """(exists (?r - receptacle ?o - object)
    (and (objectType ?o {o}Type) (receptacleType ?r {r}Type) (inReceptacle ?o ?r) {treated}))"""
BOTH_PLACED = """(exists (?r - receptacle ?o - object ?p - object)
    (and (receptacleType ?r {r}Type) (objectType ?o {o}Type) (objectType ?p {o}Type) (not (= ?o ?p))
        (inReceptacle ?o ?r) (inReceptacle ?p ?r)))"""
HELD_IN_LIGHT = """(and
    (exists (?o - object ?a - agent) (and (objectType ?o {o}Type) (holds ?a ?o)))
    (exists (?l - object ?r - receptacle ?a - agent ?p - location)
        (and (objectType ?l {r}Type) (toggleable ?l) (isToggled ?l) (inReceptacle ?l ?r)
            (receptacleAtLocation ?r ?p) (atLocation ?a ?p))))"""
GOALS = {"look": HELD_IN_LIGHT, "pick2": BOTH_PLACED}  # the others: PLACED


class Furniture(NamedTuple):
    """A receptacle of a scene."""

    id: str
    kind: str
    place: str
    is_openable: bool


def make_scene(room: str, number: int) -> list[Furniture]:
    """The furniture of one scene, the same in every game played there."""
    rng = random.Random(derive_seed("scene", room, number))
    scene = []
    words = FURNITURE[room]
    for kind, numbers in zip(words[::2], words[1::2], strict=True):
        least, most = numbers.split("-")
        for i in range(rng.randint(int(least), int(most))):
            # Some stand where another does: drawers in a row, a coffee machine on a countertop.
            is_shared = i > 0 and rng.random() < 0.2
            if kind == "countertop" and room == "kitchen" and i == 0:
                is_shared = True
            place = scene[-1].place if is_shared else f"loc_bar_{len(scene):02}"
            is_openable = kind in OPENABLE
            if kind in ("cabinet", "drawer"):
                is_openable = rng.random() < 0.9
            raw = f"{kind}_bar_{i:02}"
            if kind.endswith("basin"):  # as in genuine files: sink_bar_.._bar_sinkbasin
                raw = f"{kind.removesuffix('basin')}_bar_{i:02}_bar_basin"
            scene.append(Furniture(raw, kind, place, is_openable))
    return scene


def homes(thing: str, scene: list[Furniture], but: str | None = None) -> list[Furniture]:
    """The furniture that takes a kind of thing, except of one kind."""
    return [f for f in scene if f.kind != but and thing in CONTAINS[f.kind]]


@lru_cache(maxsize=256)
def make_game(
    seed: int, tasks: Sequence[str], receptacles: int | None, objects: int | None, scenes: range
) -> Game:
    """The game of `seed`, in one of these scenes, with at most so many receptacles and objects.

    Nothing of the wanted kind lies in a receptacle of the kind it shall be put in.
    """
    rng = random.Random(seed)
    name = rng.choice(tasks)
    task_type, rooms, *sentences = TASKS[name]
    room = rng.choice(rooms.split())
    scene = make_scene(room, rng.choice(scenes))
    usual = [o for o in OBJECTS[room] if not o.endswith("?")]
    rare = [o.rstrip("?") for o in OBJECTS[room] if o.endswith("?")]

    # What to do: an object o, a receptacle or lamp r.
    ability, after, tool = TREATMENTS.get(name, (None, None, None))
    able = [o for o in usual + rare if ability is None or o in ABILITIES[ability]]
    targets = ["desklamp"] if name == "look" else sorted({f.kind for f in scene} - {tool})
    pairs = []
    for o in able:
        for r in targets:
            is_taken = r == "desklamp" or o in CONTAINS[r]
            if is_taken and homes(o, scene, but=r):
                pairs.append((o, r))
    o, r = rng.choice(pairs)

    # Which furniture: what the task needs is kept whatever the limits are.
    needed = {rng.choice(homes(o, scene, but=r))}
    needed.add(rng.choice([f for f in scene if f.kind == r] or homes(r, scene)))
    needed.update([f for f in scene if f.kind == tool][:1])
    others = [f for f in scene if f not in needed]
    count = len(others)
    if receptacles is not None:
        count = min(count, max(receptacles - len(needed), 0))
    keep = needed.union(rng.sample(others, count))
    scene = [f for f in scene if f in keep]

    # Which things, those of the task first.
    things = []
    for thing in usual:
        copies = rng.randint(1, 3)
        if thing != o:
            things += [thing] * copies
    things += [thing for thing in rare if thing != o and rng.random() < 0.4]
    rng.shuffle(things)
    copies = rng.randint(1, 2)
    if name == "pick2":
        copies += 1
    lamp = ["desklamp"] if name == "look" else []
    things = [*[o] * copies, *lamp, *things][:objects]

    # The same as a problem: what there is, and what is to be done.
    types = {"agent1": "agent", "loc_bar_99": "location"}
    facts: list[Atom] = [("atlocation", "agent1", "loc_bar_99")]
    for f in scene:
        kind = f"{f.kind}type"
        types |= {f.id: "receptacle", f.place: "location", kind: "rtype"}
        facts += [("receptacletype", f.id, kind), ("receptacleatlocation", f.id, f.place)]
        if f.is_openable:
            facts.append(("openable", f.id))
        takes = [thing for thing in CONTAINS[f.kind] if thing in things]
        facts += [("cancontain", kind, f"{thing}type") for thing in takes]
    for i, thing in enumerate(things):
        options = homes(thing, scene, but=r if thing == o else None)
        if not options:
            continue
        f = rng.choices(options, [5 if f.kind in TABLES.split() else 1 for f in options])[0]
        raw = f"{thing}_bar_{i:02}"
        types |= {raw: "object", f"{thing}type": "otype"}
        facts += [("objecttype", raw, f"{thing}type"), ("inreceptacle", raw, f.id)]
        facts.append(("objectatlocation", raw, f.place))
        facts.append(("toggleable" if thing == "desklamp" else "pickupable", raw))
        facts += [(able_to, raw) for able_to, kinds in ABILITIES.items() if thing in kinds]
    treated = f"({ability} ?o) ({after} ?o)" if ability else ""
    goal = read_form(GOALS.get(name, PLACED).format(o=o, r=r, treated=treated))[0]
    task = rng.choice(sentences).format(o=o, r=r)
    return Game(types, facts, goal, task, task_type)


# -------------------------------------------------------------------------------- planning

MAX_PLAN = 100  # actions; more than any task takes
MAX_TRIED = 5_000  # plans; most tasks take under fifty, one that cannot be done has no end


def errands(state: State, way: frozenset[Atom]) -> Iterator[list[Atom]]:
    """What brings one nearer to a way to win.

    To fetch an object, to treat it, to put it away, to use a lamp, to go to a place.
    """
    game, held, missing = state.game, state.held, sorted(way - state.facts)

    def reach(r: str, inside: bool = True) -> list[Atom]:
        steps = []
        if game.place[r] != state.place:
            steps.append(("go", r))
        if inside and not state.is_accessible(r):
            steps.append(("open", r))
        return steps

    if held is None:
        for o in sorted({name for fact in missing for name in fact[1:]} & game.portable):
            for r in game.receptacles:
                if o in state.contents[r]:
                    yield [*reach(r), ("take", o, r)]
    else:
        is_treated = True
        for verb, (_, after, tool) in TREATMENTS.items():
            if (after, held) in missing:
                is_treated = False
                for r in game.receptacles:
                    if game.kind.get(r) == tool:
                        yield [*reach(r, inside=False), (verb, held, r)]
        is_needed = any(held in fact for fact in way)
        for r in sorted(game.fits.get(held, ())):
            # What is not needed only has to leave the hands.
            if is_treated and (not is_needed or ("inreceptacle", held, r) in missing):
                yield [*reach(r), ("move", held, r)]
    for fact in missing:
        if fact[0] == "istoggled" and ("toggleable", fact[1]) in game.static:
            for r in game.receptacles:
                if fact[1] in state.contents[r]:
                    yield [*reach(r, inside=False), ("use", fact[1])]
        elif fact[0] == "atlocation":
            yield from ([("go", r)] for r in game.at.get(fact[2], [])[:1])


def find_plan(state: State, way: frozenset[Atom], limit: int = MAX_PLAN) -> list[Atom] | None:
    """The fewest actions after which the facts of `way` hold; None if none below `limit` are found.

    Hands hold one object and every place is one `go to` away, so some shortest plan is a sequence
    of errands.
    """
    count = 0  # of plans seen; between plans of one length, the first goes first
    queue = [(0, count, state, [])]
    while queue and count < MAX_TRIED:
        _, _, state, plan = heappop(queue)
        if way <= state.facts:
            return plan
        for errand in errands(state, way):
            longer = plan + errand
            if len(longer) < limit:
                after = state.copy()
                for action in errand:
                    after.apply(action)
                count += 1
                heappush(queue, (len(longer), count, after, longer))
    return None


# ------------------------------------------------------------------------ LaMer's episode


NAME = r"\w+ \d+"  # of a thing: "mug 2"


def glimpse(observation: str) -> str:
    """What an observation says beyond its command: "On the desk 1, you see a pen 1." gives "pen 1".

    "done" where a command did what it says; nothing is lost but the order of words.
    """
    if re.match(r"You (pick up|put|move|close|turn on|sliced|clean|heat|cool)\b", observation):
        return "done"
    seen = ", ".join(re.findall(rf"\ba ({NAME})", observation))
    if seen:
        return seen
    if observation.endswith("is closed."):
        return "closed"
    return "nothing" if observation.endswith("you see nothing.") else observation


class AlfWorld(Env):
    """ALFWorld as LaMer plays it: 10 points at the winning turn, admissible commands in the prompt.

    Genuine games come in folders `train`, `valid_seen` and `valid_unseen`; where there are none,
    every eighth game is for validation. Seeds from EVAL_SEED on are validation tasks.

    Options:
        data: folder of genuine games; default: generated games
        tasks: kinds of task, a comma-separated choice of pick, look, clean, heat, cool, pick2
        turns: turns per episode, of one action and one model call each
        receptacles: most receptacles in a generated room; default: no limit
        objects: most objects in a generated room; default: no limit
        validation: evaluate in rooms "seen" or "unseen" in training
    """

    name = "alfworld"
    history_length = history_observations = 15
    warm_skill, warm_copies = 0.0, 400
    warm_token = rf" ?{NAME}"  # a name is copied as a whole: of two tokens the numbers get mixed up
    action_format = "exactly one of the listed actions inside <action> </action>"

    def __init__(
        self,
        data: str | None = None,
        tasks: str = "pick,look,clean,heat,cool,pick2",
        turns: int = 10,
        receptacles: int | None = None,
        objects: int | None = None,
        validation: str = "unseen",
    ):
        self.tasks = tuple(task.strip() for task in tasks.split(","))
        for task in self.tasks:
            if task not in TASKS:
                known = ",".join(TASKS)
                raise ValueError(f"--tasks is a list like {known}; there is no {task!r}")
        limits = [("turns", turns, 1), ("receptacles", receptacles, 3), ("objects", objects, 3)]
        for name, value, least in limits:
            if value is not None and value < least:
                raise ValueError(f"alfworld needs --{name} of at least {least}, got {value}")
        if data is not None and (receptacles or objects):
            problem = "are for generated games; leave them out, or --data"
            raise ValueError(f"--receptacles and --objects {problem}")
        if validation not in ("seen", "unseen"):
            raise ValueError(f"--validation is seen or unseen, got {validation!r}")
        self.turn_limit, self.size = turns, (receptacles, objects)
        # Scenes and genuine games, each those to train on and those to evaluate on.
        seen, unseen = range(NUM_SCENES - NUM_UNSEEN), range(NUM_SCENES - NUM_UNSEEN, NUM_SCENES)
        self.scenes = (seen, unseen if validation == "unseen" else seen)
        self.games: list[list[tuple[str, str]]] | None = None
        if data is not None:
            self.games = self.split_games(data, validation)

    def split_games(self, data: str, validation: str) -> list[list[tuple[str, str]]]:
        """The genuine games to train on, and those to evaluate on."""
        if not Path(data).is_dir():
            raise ValueError(f"--data {data}: there is no such folder")
        types = tuple(TASKS[task][0] for task in self.tasks)
        folders = [Path(data, "train"), Path(data, f"valid_{validation}")]
        if folders[0].is_dir():
            return [list_games(str(folder), types) for folder in folders]
        games = list_games(data, types)
        training = [game for i, game in enumerate(games) if i % 8 != 0]
        return [training or games, games[::8]]

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        split = 1 if seed >= EVAL_SEED else 0
        if self.games is None:
            game = make_game(seed, self.tasks, *self.size, self.scenes[split])
        else:
            games = self.games[split]
            self.file = games[seed % len(games)]
            game = load_game(*self.file)
        self.start(game)
        return self.observation, self.info()

    def task_key(self) -> str:
        return "" if self.games is None else " ".join(self.file)

    def num_eval_tasks(self) -> int:
        return 0 if self.games is None else len(self.games[1])

    def start(self, game: Game) -> None:
        """Begin an episode of a given game."""
        self.state, self.turns, self.done = State(game), 0, False
        self.options = self.state.commands()
        self.observation = self.state.intro()
        self.plan: list[Atom] = []  # the expert's, as long as it is followed
        self.seen: dict[str, str] = {}  # object -> the receptacle it was first seen in
        self.looked: dict[str, None] = {}  # receptacles looked into, in order

    def info(self) -> dict[str, Any]:
        return {"won": self.state.won, "task_type": self.state.game.task_type}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            return self.observation, 0.0, True, False, self.info()
        self.turns += 1
        meant = self.options.get(action.strip())
        self.observation = "Nothing happens."
        self.plan = self.plan[1:] if self.plan[:1] == [meant] else []
        if meant is not None:
            self.observation = self.state.apply(meant)
            self.options = self.state.commands()
            r = meant[-1]
            shows = meant[0] in ("go", "open", "examine") and r in self.state.contents
            if shows and self.state.is_accessible(r):
                self.looked[r] = None
                self.seen = dict.fromkeys(self.state.contents[r], r) | self.seen
        info = self.info()
        won = info["won"]
        self.done = won or self.turns >= self.turn_limit
        return self.observation, WIN_REWARD if won else 0.0, won, self.done and not won, info

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are a skilled helper in a household that you experience as text. Your task is to "
            "put something somewhere, perhaps cleaned, heated or cooled first, or to hold it in "
            "the light of a lamp. Go to places to see what is there, open what is closed, and "
            "carry one object at a time.\n"
            f"You have {self.turn_limit} turns of one action. Rooms and objects are the same in "
            "every episode."
        )

    def parse(self, reply: str) -> tuple[str, bool]:
        text = reply.lower()
        start, end = text.find("<action>"), text.find("</action>")
        if start < 0 or end < 0:
            return text[-30:], False  # what the original then sends as the command
        return text[start + len("<action>") : end].strip(), True

    def actions(self) -> list[str]:
        return sorted(command for command in self.options if command != "help")

    def brief(self, initial: str, records: Records, choices: str = "") -> str:
        """The places, the task, and a line a turn, "go to desk 1: pen 1, mug 2".

        Of the choices, most of a prompt, only what is in reach and not named yet is kept: two
        places can be one. Where there are none, before a reflection, comes what was found, as a
        note says it. Prompts of an episode begin alike, so an update computes little more than a
        line a turn.
        """
        turns = [f"{action}: {glimpse(observation)}" for action, observation, _ in records]
        if choices:
            near = [command for command in self.actions() if not command.startswith("go to ")]
            new = set(re.findall(NAME, " ".join(near))) - set(re.findall(NAME, " ".join(turns)))
            turns += ["here: " + ", ".join(sorted(new))] if new else []
        elif self.looked:
            turns.append(self.write_note())
        return "\n".join(["places " + glimpse(initial), initial.rpartition("\n")[2], *turns])

    def anchor(self) -> str:
        """What differs from the start: equal in equal states of the same game."""
        return " ".join(" ".join(fact) for fact in sorted(self.state.facts ^ self.state.game.start))

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        is_expert = rng.random() < skill
        thought, action = ("", self.expert()) if is_expert else self.novice(rng, memory)
        return f"{thought} <action>{self.state.game.say(action)}</action>".lstrip()

    def expert(self) -> Atom:
        """The first action of a shortest way to win."""
        if not self.plan:
            for way in self.state.game.goal:
                shortest = len(self.plan) or MAX_PLAN
                self.plan = find_plan(self.state, way, limit=shortest) or self.plan
        return self.plan[0] if self.plan else ("look",)

    def novice(self, rng: random.Random, memory: Sequence[str]) -> tuple[str, Atom]:
        """Knows what to do with things, not where they are: its thought and its action."""
        if rng.random() < 0.1:
            return "", rng.choice([self.options[command] for command in self.actions()])
        plan, unknown = self.plan_by_sight()
        return ("", plan[0]) if plan else self.search(unknown, rng, memory)

    def plan_by_sight(self) -> tuple[list[Atom], set[str]]:
        """As far as one can go with what was seen: a plan, and the objects it still lacks.

        Of the ways to win, that of which most is known, then the shortest.
        """
        plans = []
        for n, way in enumerate(self.state.game.goal):
            unknown = {o for o in self.wanted([way]) if o not in self.seen and o != self.state.held}
            if unknown:  # a lamp waits until the object is in hand
                known = self.state.game.portable - unknown
                way = frozenset(fact for fact in way if known.intersection(fact))
            plan = find_plan(self.state, way)
            if plan is not None:
                plans.append((len(unknown), len(plan), n, plan, unknown))
        return min(plans)[-2:] if plans else ([], set())

    def search(
        self, unknown: set[str], rng: random.Random, memory: Sequence[str]
    ) -> tuple[str, Atom]:
        """Looks for one of these objects where notes name it, mostly, else where nobody looked.

        The thought is what is sought, and the notes from there to the place: "find mug pen desk 1".
        So a note is read as it was written, by going on as a text went on before, and the action
        repeats what was just said.
        """
        state, game = self.state, self.state.game
        unlooked = {game.names[r]: r for r in game.receptacles if r not in self.looked}
        if not unknown or not unlooked:
            return "", ("look",)
        sought = min(sorted(unknown), key=lambda o: o not in game.portable)  # a lamp last
        sought = game.names[sought].split()[0]
        noted = self.read_notes(memory)
        thought, told = f"find {sought}", None
        for place, things in noted.items():
            kinds = [thing.split()[0] for thing in things]
            if place in unlooked and sought in kinds and rng.random() < 0.8:
                thought = " ".join(["find", *things[kinds.index(sought) :], place])
                told = place
                break
        new = [name for name in unlooked if name not in noted] or [*unlooked]
        near = [name for name in new if unlooked[name] in state.here]
        r = unlooked[told or rng.choice(near or new)]
        if r not in state.here:
            return thought, ("go", r)
        return thought, ("examine" if state.is_accessible(r) else "open", r)

    def wanted(self, ways: Iterable[frozenset[Atom]]) -> list[str]:
        """The objects these ways to win need, lamps included."""
        names = {name for way in ways for fact in way for name in fact[1:]}
        return sorted(names & self.state.game.fits.keys())

    def scripted_reflection(self, rng: random.Random) -> str:
        return f"<remark>{self.write_note()}</remark>"

    def write_note(self) -> str:
        """Each place looked into, after what was first seen there: "seen mug pen desk 1 shelf 2".

        Nothing stands between the names, and none stands twice: what copies a text goes by the
        piece before. The first mug is "mug", the word that the task has; others keep their number.
        """
        names, words, kinds = self.state.game.names, ["seen"], set()
        for place in self.looked:
            for thing, where in self.seen.items():
                if where == place:
                    kind = names[thing].split()[0]
                    words.append(names[thing] if kind in kinds else kind)
                    kinds.add(kind)
            words.append(names[place])
        return " ".join(words) if self.looked else ""

    def read_notes(self, notes: Sequence[str]) -> dict[str, list[str]]:
        """The places that notes name, and what the first of them names before each.

        The reverse of `write_note`; other words of a model's notes are left out.
        """
        names = self.state.game.names
        places = {names[r] for r in self.state.game.receptacles}
        kinds = {names[o].split()[0] for o in self.state.game.fits}
        noted: dict[str, list[str]] = {}
        for note in notes:
            things: list[str] = []
            for name in re.findall(rf"{NAME}|\w+", note.lower()):
                if name in places:
                    noted.setdefault(name, things)
                    things = []
                elif name.split()[0] in kinds:
                    things.append(name)
        return noted
