"""ALFWorld, written from scratch: household tasks in text, from genuine game files or from rooms made here.

1. The simulator: `parse_problem` reads the PDDL problem of a game into a `Game` (what never changes); a `State` of it
   lists its admissible commands, carries them out and knows when the problem's own goal holds. Texts, lists and ends
   equal the original engine's (TextWorld, ALFWorld 0.4.2), as recorded cases show, at a thousand times its speed.
2. `make_game`: kitchens, living rooms, bedrooms and bathrooms of genuine character, as the same `Game`.
3. `AlfWorld`: LaMer's episode around it (ten turns, 10 points at the winning one), and a scripted player, whose expert
   takes the shortest way and whose novice searches and reads its memory.

    env = AlfWorld()                          # generated games; AlfWorld(data=DIR) for genuine ones, in either dialect
    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step("go to cabinet 1")
    python train.py --env alfworld

What can be where, and which task goes with which room, are facts condensed from ALFRED and ALFWorld (NOTICE.alfworld).
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

from envs import Env, derive_seed


def table(text: str) -> dict[str, list[str]]:
    """A table from lines, or parts of lines, "key key: word word;"."""
    rows = [row.partition(": ") for row in re.split("[;\n]", text)]
    return {key: words.split() for keys, _, words in rows for key in keys.split()}


# ---------------------------------------------------------------------------------- reading a problem

Atom = tuple[str, ...]  # a ground fact, ("inreceptacle", "mug_bar_1", "cabinet_bar_2"), or an action, ("open", "...")

# The domain's predicates of one argument and of two; the first six and the first four are what play changes.
# The engine lower-cases whatever it reads.
UNARY = """opened isclean ishot iscool issliced istoggled openable ison cleanable heatable coolable sliceable toggleable
    pickupable isreceptacleobject isreceptacleobjectfull moveable full checked examined holdsany
    holdsanyreceptacleobject"""
BINARY = """atlocation objectatlocation inreceptacle holds receptacleatlocation inreceptacleobject receptacletype
    objecttype cancontain wasinreceptacle"""
PREDICATES = dict.fromkeys(UNARY.split(), 1) | dict.fromkeys(BINARY.split(), 2)
CHANGING = {*UNARY.split()[:6], *BINARY.split()[:4]}


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
        for token in row.partition(";")[0].replace("(", " ( ").replace(")", " ) ").split():
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
    """(name, type) pairs of a typed list: ["?a", "?b", "-", "agent"] -> [("?a", "agent"), ("?b", "agent")]."""
    pairs, untyped = [], []
    for before, token in zip(["", *names], names, strict=False):
        if not isinstance(token, str):
            raise ValueError(f"line {names.line}: a list where a name is due in {names}")
        if before == "-":
            pairs.extend((name, token) for name in untyped)
            untyped = []
        elif token != "-":
            untyped.append(token)
    if untyped:
        raise ValueError(f"line {names.line}: {untyped[0][:60]} has no type")
    return pairs


def read_atom(form: Any) -> Atom:
    """A fact or condition, checked against the domain."""
    atom = tuple(form) if isinstance(form, Form) and all(isinstance(part, str) for part in form) else ()
    if not atom or PREDICATES.get(atom[0]) != len(atom) - 1:
        line, text = getattr(form, "line", 1), str(form)[:80]
        raise ValueError(f"line {line}: unknown predicate, or one with another number of arguments: {text}")
    return atom


def flatten_goal(form: Any, scope: dict[str, str], variables: dict[str, str], conditions: list[Atom]) -> None:
    """Collect a goal of nested `and`, `exists` and `not (= ..)` as variables with their types, and conditions."""
    match form:
        case ["and", _, *_]:
            for part in form[1:]:
                flatten_goal(part, scope, variables, conditions)
            return
        case ["exists", Form() as names, body]:
            scope = dict(scope)
            for name, kind in typed_names(names):
                scope[name] = f"{name} {len(variables)}"  # the same name may stand in two places for two things
                variables[scope[name]] = kind
            flatten_goal(body, scope, variables, conditions)
            return
        case ["not", ["=", str() as x, str() as y]]:
            atom = ("!=", x, y)
        case _:
            atom = read_atom(form)
    conditions.append(tuple(scope.get(name, name) for name in atom))


class Game:
    """A game: tables of what never changes while it is played, the facts true at the start, and the goal.

    The goal is a list of ways to win; each is the set of changeable facts that must hold together.
    """

    def __init__(
        self, types: dict[str, str], facts: Iterable[Atom], goal: Form, task: str, task_type: str, old: bool = False
    ):
        self.task, self.task_type, self.old, self.types = task, task_type, old, types
        self.static = set(facts)
        rows = defaultdict(list)
        for predicate, *arguments in sorted(self.static):
            rows[predicate].append(arguments)
        self.agent = next(name for name, kind in types.items() if kind == "agent")
        self.names = shown_names({name for fact in self.static for name in fact[1:]})
        self.place = dict(rows["receptacleatlocation"])  # receptacle -> where one stands to use it
        self.receptacles = sorted(self.place)  # lists and numbers follow the order of the raw ids, here and below
        self.at = {place: [r for r in self.receptacles if self.place[r] == place] for place in self.place.values()}
        kinds = dict(rows["objecttype"] + rows["receptacletype"])
        self.kind = {name: kind.removesuffix("type") for name, kind in kinds.items()}
        self.fits = {  # object -> receptacles that take it
            o: {r for r in self.receptacles if ("cancontain", kinds.get(r), kind) in self.static}
            for o, kind in rows["objecttype"]
        }
        self.openable, self.portable = ({name for (name,) in rows[p]} for p in ("openable", "pickupable"))
        self.sliceable = [name for (name,) in rows["sliceable"]]
        self.inner = rows["inreceptacleobject"]
        self.start = {fact for fact in self.static if fact[0] in CHANGING}
        self.static = {fact for fact in self.static if not self.can_change(fact)}
        self.goal = self.ground(goal)
        places = {*self.at, next(fact[2] for fact in self.start if fact[0] == "atlocation")}
        self.travel = {p: [("go", r) for r in self.receptacles if self.place[r] != p] for p in places}
        self.said: dict[Atom, str] = {}

    def can_change(self, fact: Atom) -> bool:
        """Only what can be carried ever changes its receptacle, so a lamp on a desk is part of the furniture."""
        return fact[0] in CHANGING and (fact[0] != "inreceptacle" or fact[1] in self.portable)

    def ground(self, goal: Form) -> list[frozenset[Atom]]:
        """Every assignment of the goal's variables that the unchanging facts allow, as what is left to be achieved."""
        variables, conditions = {}, []
        flatten_goal(goal, {}, variables, conditions)
        known = {*variables, *self.types, *self.types.values()}
        for name in [name for condition in conditions for name in condition[1:]] + [*variables.values()]:
            if name not in known:
                raise ValueError(f"line {goal.line}: the goal names {name[:60]}, which is not declared")
        order = ["", *variables]
        last = [max(order.index(name) if name in variables else 0 for name in c) for c in conditions]
        rows: list[tuple[dict[str, str], frozenset[Atom]]] = [({}, frozenset())]  # (assignment so far, facts it needs)
        for i, variable in enumerate(order):
            values = [name for name in self.names if self.types.get(name) == variables[variable]] if variable else [""]
            if len(rows) * len(values) > 100_000:
                raise ValueError(f"line {goal.line}: the goal has too many variables")
            rows = [(bound | {variable: value}, needed) for bound, needed in rows for value in values]
            for condition in [c for c, k in zip(conditions, last, strict=True) if k == i]:
                before, rows = rows, []
                for bound, needed in before:
                    atom = tuple(bound.get(name, name) for name in condition)
                    if self.can_change(atom):
                        rows.append((bound, needed | {atom}))
                    elif atom in self.static or (atom[0] == "!=" and atom[1] != atom[2]):
                        rows.append((bound, needed))
        return list(dict.fromkeys(needed for _, needed in rows))

    def say(self, action: Atom) -> str:
        """An action as the command a player types."""
        if action not in self.said:
            verb, *ids = action
            start, link = COMMANDS.get(verb, (verb, "with"))
            if self.old and verb == "move":
                start, link = "put", "in/on"
            self.said[action] = " ".join([start, f" {link} ".join(self.names[i] for i in ids)]).strip()
        return self.said[action]


def shown_names(ids: Iterable[str]) -> dict[str, str]:
    """Raw id -> shown name; within a class numbers fall as ids rise: of two cabinets, the first is `cabinet 2`."""
    names, counts = {}, defaultdict(int)
    for name in sorted(ids, reverse=True):
        kind = name.partition("_bar_")[0] + "basin" * ("basin" in name)
        counts[kind] += 1
        names[name] = f"{kind} {counts[kind]}" if "_bar_" in name else name
    return names


def parse_problem(text: str, task: str, task_type: str, old: bool = False, source: str = "problem") -> Game:
    """The game of a PDDL problem and its task sentence; ValueError names `source` and the line."""
    try:
        forms = read_form(text)
        if len(forms) != 1 or forms[0][:1] != ["define"]:
            raise ValueError("line 1: a problem is one list (define (problem ..) ..)")
        sections = {part[0]: part for part in forms[0] if isinstance(part, Form) and part and isinstance(part[0], str)}
        objects, init, goal = (sections.get(name, Form()) for name in (":objects", ":init", ":goal"))
        objects[:1] = []
        types = dict(typed_names(objects))
        agents = [name for name, kind in types.items() if kind == "agent"]
        if len(agents) != 1:
            raise ValueError(f"line {objects.line}: {len(agents)} agents, {' '.join(agents)[:60]}; only one can play")
        facts = []
        for form in init[1:]:
            if form[:1] == ["="]:  # distances and costs, which no text game uses
                continue
            facts.append(read_atom(form))
            for name in form[1:]:
                if name not in types:
                    raise ValueError(f"line {form.line}: {name[:60]} in {form} is not declared")
        if sum(fact[0] == "atlocation" for fact in facts) != 1:
            raise ValueError(f"line {init.line}: the agent must be at exactly one place")
        if len(goal) != 2 or len(goal[1]) < 2:
            raise ValueError(f"line {goal.line}: the goal is empty")
        return Game(types, facts, goal[1], task, task_type, old)
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from None


# --------------------------------------------------------------------------------------- the simulator

COMMANDS = {"go": ("go to", ""), "take": ("take", "from"), "move": ("move", "to")}  # others: verb x, verb x with y
# verb: which objects can be treated so, what they become, where
TREATMENTS = table("clean: cleanable isclean sinkbasin; heat: heatable ishot microwave; cool: coolable iscool fridge")
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

    Beside the domain's facts there is ("notin", o, r), read by `look`, for an object taken out of r and not put back.
    """

    def __init__(self, game: Game):
        self.game, self.facts = game, set(game.start)
        self.contents = {r: [] for r in game.receptacles}  # in the order of ids
        for o, r in sorted(fact[1:] for fact in game.start if fact[0] == "inreceptacle"):
            if r in self.contents:
                self.contents[r].append(o)
        self.place = next(fact[2] for fact in game.start if fact[0] == "atlocation")
        self.here = game.at.get(self.place, [])  # the receptacles at this place
        self.held = next((fact[2] for fact in sorted(game.start) if fact[0] == "holds"), None)

    def copy(self) -> "State":
        other = State.__new__(State)
        other.__dict__.update(self.__dict__)
        other.facts, other.contents = set(self.facts), {r: list(c) for r, c in self.contents.items()}
        return other

    @property
    def won(self) -> bool:
        return any(way <= self.facts for way in self.game.goal)

    def is_accessible(self, r: str) -> bool:
        return r not in self.game.openable or ("opened", r) in self.facts

    def actions(self) -> Iterator[Atom]:
        """Whatever may be done now, in no particular order and perhaps twice."""
        game, facts, held = self.game, self.facts, self.held
        yield from (("look",), ("inventory",)) if game.old else (("look",), ("inventory",), ("help",))
        yield from game.travel[self.place]
        for r in self.here:
            yield "examine", r
            if r in game.openable:
                yield ("close" if ("opened", r) in facts else "open"), r
            yield from (("use", o) for o in self.contents[r] if ("toggleable", o) in game.static)
            if held is None and self.is_accessible(r):
                yield from (("take", o, r) for o in self.contents[r] if o in game.portable)
            elif r in game.fits.get(held, ()) and self.is_accessible(r):
                yield "move", held, r
        if held is None:
            return
        yield "examine", held
        for verb, (ability, _, tool) in TREATMENTS.items():
            if (ability, held) in game.static:
                yield from ((verb, held, r) for r in self.here if game.kind.get(r) == tool)
        if game.kind.get(held) in ("knife", "butterknife"):
            here = (o for o in game.sliceable if ("objectatlocation", o, self.place) in facts)
            yield from (("slice", o, held) for o in here)

    def commands(self) -> dict[str, Atom]:
        """The admissible commands and what they mean."""
        say, said = self.game.say, self.game.said
        return {said.get(action) or say(action): action for action in self.actions()}

    def apply(self, action: Atom) -> str:
        """Carry out an action that is allowed and return the feedback."""
        game, facts, held, verb = self.game, self.facts, self.held, action[0]
        x, y = (*action[1:], None, None)[:2]
        a, b = game.names.get(x), game.names.get(y)
        match verb:
            case "look":
                return self.look()
            case "inventory":
                return f"You are carrying: a {game.names[held]}." if held else "You are not carrying anything."
            case "help":
                return HELP
            case "go":
                facts.discard(("atlocation", game.agent, self.place))
                self.place = game.place[x]
                self.here = game.at[self.place]
                facts.add(("atlocation", game.agent, self.place))
                return f"You arrive at {game.names[self.place] if game.old else a}. {self.describe(x)}"
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
                return f"You put the {a} in/on the {b}." if game.old else f"You move the {a} to the {b}."
            case "examine":
                return self.describe(x) if x in self.contents else self.inspect(x)
            case _:
                gained, lost, feedback = EFFECTS[verb]
                facts.discard((lost, x))
                facts |= {(gained, x)} if gained else set()
                return feedback.format(a, b) + (self.describe(x) if verb == "open" else "")

    def intro(self) -> str:
        """The first observation: the room and the task."""
        room = self.look() if self.here else self.look().replace("nothing", self.listing(self.game.receptacles))
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {self.game.task}."

    def listing(self, ids: Iterable[str], article: str = "a ") -> str:
        """Two mugs give "a mug 2, and a mug 1"; none "nothing"."""
        names = [article + self.game.names[i] for i in ids]
        return ", ".join(names[:-1]) + f", and {names[-1]}" if len(names) > 1 else "".join(names) or "nothing"

    def look(self) -> str:
        if not self.here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        # The engine lists what was carried from one receptacle of this place to another, once per receptacle it left.
        lying = [o for o in self.game.fits if ("objectatlocation", o, self.place) in self.facts]
        around = [o for o in lying for r in self.here if ("notin", o, r) in self.facts]
        return f"You are facing the {self.listing(self.here, '')}. Next to it, you see {self.listing(around)}."

    def describe(self, r: str) -> str:
        """What a receptacle shows."""
        if not self.is_accessible(r):
            return f"The {self.game.names[r]} is closed."
        start = "The {} is open. In it, you see" if r in self.game.openable else "On the {}, you see"
        return f"{start.format(self.game.names[r])} {self.listing(self.contents[r])}."

    def inspect(self, o: str) -> str:
        """What a held object shows."""
        game, name = self.game, self.game.names[o]
        states = ("isclean", "ishot", "iscool", "issliced", "istoggled")
        clean, hot, cool, sliced, on = ((state, o) in self.facts for state in states)
        if ("isreceptacleobject", o) in game.static:
            inside = [i for i, outside in game.inner if outside == o]
            return f"This is a normal {name}. In it, you see {self.listing(inside)}."
        words = " and ".join((["hot"] * hot or ["cool"] * cool) + ["clean"] * clean)
        if words:
            return f"This is a {'cold' if words == 'cool' and not sliced else words}{' sliced' * sliced} {name}."
        if on and ("toggleable", o) in game.static:
            return f"This {name} is on."
        if sliced and o in game.sliceable:
            return f"This is a sliced {name}."
        return f"There's nothing special about {name}."


# ------------------------------------------------------------------------------------- genuine games

MAX_BYTES = 5_000_000  # a game file has some hundred kB; far larger ones are something else


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes is more than any game file has")
        if not isinstance(data := json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("line 1: not a JSON object")
        return data
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors that name the place
        raise ValueError(f"{path}: {error}") from None


@lru_cache(maxsize=256)
def load_game(path: str, task_type: str) -> Game:
    """The game of a `game.tw-pddl`, in either dialect; the task type stands in the `traj_data.json` beside it."""
    data = read_json(Path(path))
    grammar, problem = data.get("grammar"), data.get("pddl_problem")
    task = re.search(r'Your task is to: (.*?)\."', grammar) if isinstance(grammar, str) else None
    if task is None or not isinstance(problem, str):
        raise ValueError(f"{path}: no sentence 'Your task is to: ...' in its grammar, or no pddl_problem")
    old = "move {o} to {r}" not in grammar
    return parse_problem(problem, task[1], task_type, old, source=f"{path}: pddl_problem")


@lru_cache(maxsize=16)
def list_games(folder: str, types: tuple[str, ...]) -> list[tuple[str, str]]:
    """(game file, task type) of all games below a folder, each read once and found sound.

    Like the original it passes over trials without a game file, unsolvable ones, movable receptacles and slicing.
    """
    games, skipped = [], "no traj_data.json anywhere"
    for root, _, files in sorted(os.walk(folder)):
        game, trajectory = Path(root, "game.tw-pddl"), Path(root, "traj_data.json")
        inside = os.path.relpath(root, folder)
        if not {game.name, trajectory.name} & set(files) or "movable" in inside or "Sliced" in inside:
            continue
        if trajectory.name not in files:
            raise ValueError(f"{trajectory}: missing, though there is a {game.name}")
        if game.name not in files:
            skipped = f"{game} is missing"
        elif read_json(game).get("solvable") is not True:
            skipped = f"{game} is not marked as solvable"
        elif (task_type := read_json(trajectory).get("task_type")) not in types:
            skipped = f"{trajectory} has task type {task_type!r:.60}"
        else:
            load_game(str(game), task_type)
            games.append((str(game), task_type))
    if not games:
        raise ValueError(f"{folder}: no game of the wanted tasks: {skipped}")
    return games


# ----------------------------------------------------------------------------------- generated games

FOOD, CUTLERY = "apple bread egg lettuce potato tomato", "butterknife fork knife ladle spatula spoon"
CROCKERY, POTS, BOTTLES = "bowl cup mug plate", "kettle pan pot", "glassbottle winebottle"
SHAKERS, SMALL, DECOR = "peppershaker saltshaker", "cd cellphone creditcard keychain watch", "statue vase"
PAPER, WASHED = "book newspaper pen pencil", "apple egg lettuce potato tomato cloth dishsponge soapbar"
BATH = "candle cloth dishsponge handtowel soapbar soapbottle spraybottle tissuebox toiletpaper"
DRESSER = f"{CROCKERY} {BOTTLES} {SMALL} {DECOR} {PAPER} alarmclock basketball box candle cloth laptop remotecontrol"
DRESSER += " spraybottle tennisracket tissuebox toiletpaper wateringcan desklamp"
# Which receptacle takes which objects: ALFRED's relation, for the objects that occur here, and where lamps stand.
CONTAINS = table(f"""
coffeetable countertop diningtable sidetable: {DRESSER} {FOOD} {CUTLERY} {POTS} {SHAKERS} {BATH} baseballbat
armchair ottoman sofa: basketball book box cellphone cloth creditcard keychain laptop newspaper pillow remotecontrol
coffeemachine: mug; handtowelholder: handtowel; laundryhamper: cloth; stoveburner: {POTS}; toaster: nothing
toiletpaperhanger: toiletpaper; towelholder: towel; tvstand: tissuebox
bathtubbasin: cloth dishsponge handtowel soapbar
bed: baseballbat basketball book cellphone laptop newspaper pillow tennisracket
cabinet: {BATH} {CROCKERY} {BOTTLES} {POTS} {SHAKERS} book box cd ladle newspaper plunger vase wateringcan
cart: {BATH} mug plunger statue vase
desk: {DRESSER} soapbottle
drawer: {BATH} {CUTLERY} {SHAKERS} {SMALL} {PAPER} remotecontrol wateringcan
dresser: {DRESSER}
fridge: {FOOD} {CROCKERY} {BOTTLES} pan pot
garbagecan: {FOOD} {BATH.removeprefix("candle")} cd newspaper pen pencil winebottle
microwave: {CROCKERY} apple bread egg potato tomato glassbottle
safe: {SMALL} {DECOR}
shelf: {BATH} {CROCKERY} {BOTTLES} {SHAKERS} {SMALL} {DECOR} {PAPER} alarmclock box desklamp kettle pot remotecontrol\
 wateringcan
sinkbasin: {CUTLERY} {CROCKERY} {POTS} {WASHED} glassbottle handtowel
toilet: {BATH} newspaper
""")
ABILITIES = table(f"""
heatable: apple bread cup egg mug plate potato tomato
coolable: {FOOD} {CROCKERY} pan pot winebottle
cleanable: {CUTLERY} {CROCKERY} {POTS} {WASHED}
sliceable: {FOOD}
isreceptacleobject: {CROCKERY} box pan pot
""")
# Receptacles with the least and most pieces of each; objects, with ? those not always there.
FURNITURE = table("""
kitchen: cabinet 3-9 coffeemachine 1-1 countertop 1-3 diningtable 0-1 drawer 2-7 fridge 1-1 garbagecan 1-1\
 microwave 1-1 shelf 0-2 sidetable 0-1 sinkbasin 1-1 stoveburner 2-4 toaster 1-1
livingroom: armchair 1-2 cabinet 0-4 coffeetable 1-2 diningtable 0-1 drawer 1-6 dresser 0-1 garbagecan 1-1\
 ottoman 0-1 safe 0-1 shelf 0-6 sidetable 1-3 sofa 1-2 tvstand 0-1
bedroom: armchair 0-2 bed 1-1 cabinet 0-2 desk 1-2 drawer 2-8 dresser 0-1 garbagecan 1-1 laundryhamper 0-1\
 safe 0-1 shelf 1-5 sidetable 1-2
bathroom: bathtubbasin 0-1 cabinet 2-5 cart 0-1 countertop 1-2 drawer 0-5 garbagecan 1-1 handtowelholder 1-2\
 shelf 0-2 sidetable 0-1 sinkbasin 1-2 toilet 1-1 toiletpaperhanger 1-1 towelholder 1-1
""")
OBJECTS = table(f"""
kitchen: {FOOD} {CROCKERY} {SHAKERS} butterknife dishsponge fork knife pan pot soapbottle spatula spoon\
 glassbottle? winebottle? statue? vase? kettle? ladle? cellphone? creditcard?
livingroom: box creditcard keychain laptop newspaper pillow remotecontrol statue\
 book? cellphone? pen? pencil? plate? tissuebox? vase? watch? wateringcan?
bedroom: alarmclock book cd cellphone creditcard keychain laptop pen pencil pillow\
 baseballbat? basketball? bowl? box? cloth? mug? statue? tennisracket? tissuebox?
bathroom: candle cloth handtowel plunger soapbar soapbottle spraybottle toiletpaper towel dishsponge? tissuebox?
""")
OPENABLE = {"cabinet", "drawer", "fridge", "microwave", "safe"}
TABLES = {"coffeetable", "countertop", "diningtable", "sidetable", "desk", "dresser", "bed", "sofa"}  # for most things
NUM_SCENES, NUM_UNSEEN = 30, 4  # per kind of room; the last ones are never trained in (ALFWorld: 4 scenes in all)

# Kinds of task: name in game files; rooms; two ways to say it. {o} is the kind of object, {r} of receptacle or lamp.
TASK_ROWS = """
pick: pick_and_place_simple; kitchen livingroom bedroom bathroom; put a {o} in {r}; put some {o} on {r}
look: look_at_obj_in_light; bedroom livingroom; look at {o} under the {r}; examine the {o} with the {r}
clean: pick_clean_then_place_in_recep; kitchen bathroom; put a clean {o} in {r}; clean some {o} and put it in {r}
heat: pick_heat_then_place_in_recep; kitchen; put a hot {o} in {r}; heat some {o} and put it in {r}
cool: pick_cool_then_place_in_recep; kitchen; put a cool {o} in {r}; cool some {o} and put it in {r}
pick2: pick_two_obj_and_place; kitchen livingroom bedroom bathroom; put two {o} in {r}; find two {o} and put them in {r}
"""
TASKS = {name: row.split("; ") for name, _, row in (line.partition(": ") for line in TASK_ROWS.strip().splitlines())}
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
    rng, scene = random.Random(derive_seed("scene", room, number)), []
    words = FURNITURE[room]
    for kind, numbers in zip(words[::2], words[1::2], strict=True):
        for i in range(rng.randint(*map(int, numbers.split("-")))):
            shares = (i and rng.random() < 0.2) or (kind == "countertop" and room == "kitchen" and i == 0)
            place = scene[-1].place if shares else f"loc_bar_{len(scene):02}"
            is_openable = kind in OPENABLE and (kind not in ("cabinet", "drawer") or rng.random() < 0.9)
            raw = f"{kind.removesuffix('basin')}_bar_{i:02}" + "_bar_basin" * kind.endswith("basin")
            scene.append(Furniture(raw, kind, place, is_openable))
    return scene


@lru_cache(maxsize=256)
def make_game(seed: int, tasks: Sequence[str], receptacles: int | None, objects: int | None, scenes: range) -> Game:
    """The game of `seed`, in one of these scenes, with at most so many receptacles and objects.

    Nothing of the wanted kind lies in a receptacle of the kind it shall be put in.
    """
    rng = random.Random(seed)
    name = rng.choice(tasks)
    task_type, rooms, *sentences = TASKS[name]
    room = rng.choice(rooms.split())
    scene = make_scene(room, rng.choice(scenes))
    ability, after, tool = TREATMENTS.get(name, (None,) * 3)
    usual, rare = ([o.rstrip("?") for o in OBJECTS[room] if o.endswith("?") == is_rare] for is_rare in (False, True))

    def homes(o: str, scene: list[Furniture], but: str | None = None) -> list[Furniture]:
        return [f for f in scene if f.kind != but and o in CONTAINS[f.kind]]

    able = [o for o in usual + rare if ability is None or o in ABILITIES[ability]]
    targets = ["desklamp"] if name == "look" else sorted({f.kind for f in scene} - {tool})
    o, r = rng.choice([(o, r) for o in able for r in targets if o in CONTAINS.get(r, able) and homes(o, scene, r)])

    # What the task needs is kept whatever the limits are.
    needed = {rng.choice(homes(o, scene, r)), rng.choice([f for f in scene if f.kind == r] or homes(r, scene))}
    needed.update([f for f in scene if f.kind == tool][:1])
    others = [f for f in scene if f not in needed]
    count = len(others) if receptacles is None else min(len(others), max(receptacles - len(needed), 0))
    keep = needed.union(rng.sample(others, count))
    scene = [f for f in scene if f in keep]
    things = [thing for thing in usual for _ in range(rng.randint(1, 3)) if thing != o]
    things += [thing for thing in rare if thing != o and rng.random() < 0.4]
    rng.shuffle(things)
    things = [o] * (rng.randint(1, 2) + (name == "pick2")) + ["desklamp"] * (name == "look") + things
    things = things[:objects]

    types = {"agent1": "agent", "loc_bar_99": "location"}
    facts: list[Atom] = [("atlocation", "agent1", "loc_bar_99")]
    for f in scene:
        types |= {f.id: "receptacle", f.place: "location", f"{f.kind}type": "rtype"}
        facts += [("receptacletype", f.id, f"{f.kind}type"), ("receptacleatlocation", f.id, f.place)]
        facts += [("openable", f.id)] * f.is_openable
        facts += [("cancontain", f"{f.kind}type", f"{thing}type") for thing in CONTAINS[f.kind] if thing in things]
    for i, thing in enumerate(things):
        if options := homes(thing, scene, r if thing == o else None):
            f = rng.choices(options, [5 if f.kind in TABLES else 1 for f in options])[0]
            raw = f"{thing}_bar_{i:02}"
            types |= {raw: "object", f"{thing}type": "otype"}
            facts += [("objecttype", raw, f"{thing}type"), ("inreceptacle", raw, f.id)]
            facts += [("objectatlocation", raw, f.place), ("toggleable" if thing == "desklamp" else "pickupable", raw)]
            facts += [(ability, raw) for ability, kinds in ABILITIES.items() if thing in kinds]
    treated = f"({ability} ?o) ({after} ?o)" if ability else ""
    goal = GOALS.get(name, PLACED).format(o=o, r=r, treated=treated)
    return Game(types, facts, read_form(goal)[0], rng.choice(sentences).format(o=o, r=r), task_type)


# ------------------------------------------------------------------------------------------- planning


def errands(state: State, way: frozenset[Atom]) -> Iterator[list[Atom]]:
    """What brings one nearer to a way to win: fetch an object, treat it, put it away, use a lamp, go to a place."""
    game, held, missing = state.game, state.held, sorted(way - state.facts)

    def reach(r: str, inside: bool = True) -> list[Atom]:
        must_open = inside and not state.is_accessible(r)
        return [("go", r)] * (game.place[r] != state.place) + [("open", r)] * must_open

    if held is None:
        for o in sorted({name for fact in missing for name in fact[1:]} & game.portable):
            yield from ([*reach(r), ("take", o, r)] for r in game.receptacles if o in state.contents[r])
    else:
        todo = [(v, tool) for v, (_, after, tool) in TREATMENTS.items() if (after, held) in missing]
        for verb, tool in todo:
            tools = [r for r in game.receptacles if game.kind.get(r) == tool]
            yield from ([*reach(r, inside=False), (verb, held, r)] for r in tools)
        is_needed = any(held in fact for fact in way)
        for r in sorted(game.fits.get(held, ())):
            if not todo and (not is_needed or ("inreceptacle", held, r) in missing):
                yield [*reach(r), ("move", held, r)]
    for fact in missing:
        if fact[0] == "istoggled" and ("toggleable", fact[1]) in game.static:
            stands = [r for r in game.receptacles if fact[1] in state.contents[r]]
            yield from ([*reach(r, inside=False), ("use", fact[1])] for r in stands)
        elif fact[0] == "atlocation":
            yield from ([("go", r)] for r in game.at.get(fact[2], [])[:1])


def find_plan(state: State, way: frozenset[Atom], limit: int = 100) -> list[Atom] | None:
    """The fewest actions after which the facts of `way` hold; None if there are none below `limit`.

    Hands hold one object and every place is one `go to` away, so some shortest plan is a sequence of errands.
    """
    queue, count = [(0, 0, state, [])], 0
    while queue:
        _, _, state, plan = heappop(queue)
        if way <= state.facts:
            return plan
        for errand in errands(state, way):
            if len(plan) + len(errand) < limit:
                after, count = state.copy(), count + 1
                for action in errand:
                    after.apply(action)
                heappush(queue, (len(plan) + len(errand), count, after, plan + errand))
    return None


# ------------------------------------------------------------------------------------ LaMer's episode


class AlfWorld(Env):
    """ALFWorld as LaMer plays it: 10 points at the winning turn, `turns` turns, admissible commands in the prompt.

    Without `data` games are made; `receptacles` and `objects` then limit a room's size, for small models. `data` is a
    folder of genuine games; its `train` and `valid_*` folders are used if there are such, else every eighth game is for
    validation. Seeds from 2^31 on are validation tasks, in rooms "seen" or "unseen" in training.
    """

    name = "alfworld"
    history_length = history_observations = 15
    warm_skill = 0.0
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
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"--tasks is a list like {','.join(TASKS)}; there is no {unknown[0]!r}")
        for name, value, least in (("turns", turns, 1), ("receptacles", receptacles, 3), ("objects", objects, 3)):
            if value is not None and value < least:
                raise ValueError(f"alfworld needs --{name} of at least {least}, got {value}")
        if data is not None and (receptacles or objects):
            raise ValueError("--receptacles and --objects are for generated games; leave them out, or --data")
        if validation not in ("seen", "unseen"):
            raise ValueError(f"--validation is seen or unseen, got {validation!r}")
        self.turn_limit, self.size, self.games = turns, (receptacles, objects), None
        first = NUM_SCENES - NUM_UNSEEN
        self.scenes = range(first), range(first, NUM_SCENES) if validation == "unseen" else range(first)
        if data is not None:
            if not Path(data).is_dir():
                raise ValueError(f"--data {data}: there is no such folder")
            types = tuple(TASKS[task][0] for task in self.tasks)
            folders = [Path(data, "train"), Path(data, f"valid_{validation}")]
            if folders[0].is_dir():
                self.games = [list_games(str(folder), types) for folder in folders]
            else:
                games = list_games(data, types)
                self.games = [[g for i, g in enumerate(games) if i % 8] or games, games[::8]]

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        split = seed >= 2**31
        if self.games is None:
            self.start(make_game(seed, self.tasks, *self.size, self.scenes[split]))
        else:
            self.start(load_game(*self.games[split][seed % len(self.games[split])]))
        return self.observation, self.info()

    def start(self, game: Game) -> None:
        """Begin an episode of a given game."""
        self.state, self.turns, self.done = State(game), 0, False
        self.options = self.state.commands()
        self.observation = self.state.intro()
        self.plan: list[Atom] = []  # the expert's, as long as it is followed
        self.seen: dict[str, str] = {}  # object -> the receptacle it was first seen in
        self.looked: set[str] = set()  # receptacles looked into

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
            for r in self.state.contents.keys() & set(meant[1:]):
                if self.state.is_accessible(r):
                    self.looked.add(r)
                    self.seen = dict.fromkeys(self.state.contents[r], r) | self.seen
        info = self.info()
        self.done = info["won"] or self.turns >= self.turn_limit
        return self.observation, 10.0 * info["won"], info["won"], self.done and not info["won"], info

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are a skilled helper in a household that you experience as text. Your task is to put something "
            "somewhere, perhaps cleaned, heated or cooled first, or to hold it in the light of a lamp. Go to places to "
            "see what is there, open what is closed, and carry one object at a time.\n"
            f"You have {self.turn_limit} turns of one action. Rooms and objects are the same in every episode."
        )

    def parse(self, reply: str) -> tuple[str, bool]:
        text = reply.lower()
        start, end = text.find("<action>"), text.find("</action>")
        if start < 0 or end < 0:
            return text[-30:], False  # what the original then sends as the command
        return text[start + 8 : end].strip(), True

    def actions(self) -> list[str]:
        return sorted(command for command in self.options if command != "help")

    def gist(self, initial: str) -> str:
        """The task alone: where one can go stands among the actions."""
        return initial.rpartition("\n")[2]

    def anchor(self) -> str:
        """What differs from the start: equal in equal states of the same game."""
        return " ".join(" ".join(fact) for fact in sorted(self.state.facts ^ self.state.game.start))

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        action = self.expert() if rng.random() < skill else self.novice(rng, memory)
        return f"<action>{self.state.game.say(action)}</action>"

    def expert(self) -> Atom:
        """The first action of a shortest way to win."""
        for way in [] if self.plan else self.state.game.goal:
            self.plan = find_plan(self.state, way, len(self.plan) or 100) or self.plan
        return self.plan[0] if self.plan else ("look",)

    def novice(self, rng: random.Random, memory: Sequence[str]) -> Atom:
        """Knows what to do with things, not where they are: looks where its notes say, else anywhere not yet seen."""
        state, game = self.state, self.state.game
        if rng.random() < 0.1:
            return rng.choice([self.options[command] for command in self.actions()])
        plans = []
        for n, way in enumerate(game.goal):
            unknown = {o for o in self.wanted([way]) if o not in self.seen and o != state.held}
            if unknown:  # as far as one can go with what has been seen: a lamp waits until the object is in hand
                way = frozenset(fact for fact in way if game.portable.intersection(fact) - unknown)
            plan = find_plan(state, way)
            plans += [(len(unknown), len(plan), n, plan)] if plan is not None else []
        if plans and min(plans)[3]:
            return min(plans)[3][0]
        unlooked = [r for r in game.receptacles if r not in self.looked]
        wanted = {game.names[o] for o in self.wanted(game.goal) if o not in self.seen}
        notes = re.findall(r"(\w+ \d+) in (\w+ \d+)", " ".join(memory))
        told = [r for r in unlooked if any(o in wanted and game.names[r] == name for o, name in notes)]
        if not told or rng.random() < 0.2:
            empty = {name for note in memory if note.startswith("no ") for name in re.findall(r"\w+ \d+", note)}
            told = [r for r in unlooked if game.names[r] not in empty] or unlooked
        here = [r for r in told if r in state.here]
        if here:
            return ("examine" if state.is_accessible(here[0]) else "open", here[0])
        return ("go", rng.choice(told)) if told else ("look",)

    def wanted(self, ways: Iterable[frozenset[Atom]]) -> list[str]:
        """The objects these ways to win need, lamps included."""
        return sorted({name for way in ways for fact in way for name in fact[1:]} & self.state.game.fits.keys())

    def scripted_reflection(self, rng: random.Random) -> str:
        names, wanted = self.state.game.names, self.wanted(self.state.game.goal)
        found = [f"{names[o]} in {names[r]}" for o, r in self.seen.items() if o in wanted]
        if found or not wanted or not self.looked:
            return f"<remark>{', '.join(found)}</remark>"
        kind = self.state.game.kind[wanted[0]]
        return f"<remark>no {kind} in {', '.join(names[r] for r in sorted(self.looked))}</remark>"
