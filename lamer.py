"""LaMer: meta-RL that teaches a language model to explore, as one file (Jiang et al., ICLR 2026, arXiv 2512.16848).

A *trial* is up to N episodes of the same task from the same initial state. After an episode that fails, the model
writes a reflection; the next episode's prompts carry it. Returns cross episodes with the discount gamma_traj, so an
early episode is paid for what it lets later ones achieve: that is what makes exploring worth learning. At test time
only the context adapts.

Read from the top; the data flows in this order:

    run_trial              one trial as a generator: yields prompts, receives replies, ends as a Trial
    SlotSampler.run        plays hundreds of trials at once with one model; nobody waits for the slowest
    compute_returns        G_t(n) = g_t(n) + sum_{m>n} gamma_traj^(m-n) g_0(m)
    compute_advantages     G minus what the same task's other trials got at the same point
    update                 clipped policy gradient on every reply token, reflections included

A Turn is one model call and the unit of training. Each stage fills its own fields and overwrites none. Environments
are known only by the interface in envs.py.
"""

import math
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, CacheLayerMixin

from envs import Env, between

# ------------------------------------------------------------------------------------------- the trial


@dataclass
class Turn:
    """One model call: what was asked, what was answered, what it earned. `logps` are those of the sampling policy."""

    episode: int  # 0-based
    phase: str  # "play" or "reflect"
    prompt_ids: list[int]
    reply_ids: list[int]  # exactly as sampled, the end token included; what is trained on
    logps: list[float]  # one per reply token
    reply: str
    observation: str  # what the environment showed before
    reward: float  # of the environment; 0 for a reflection
    is_valid: bool  # the reply could be parsed
    anchor: str  # key of the state the turn was taken in, for GiGPO
    ret: float = 0.0  # the return G, set by compute_returns
    penalty: float = 0.0  # what an invalid reply cost; `ret` is after it
    value: float = 0.0  # the value head's estimate of the return, set by compute_values (ppo only)
    advantage: float = 0.0  # set by compute_advantages


Records = Sequence[tuple[str, str, bool]]  # (action, observation after it, done) of every turn of an episode


class Episode(NamedTuple):
    """What memory keeps of a failed episode."""

    records: Records
    reflection: str


@dataclass
class Trial:
    """Up to N episodes of one task by one agent."""

    seed: int  # the task
    episodes: int  # N, as planned; a trial ends earlier at the first success
    turns: list[Turn] = field(default_factory=list)
    past: list[Episode] = field(default_factory=list)  # what later episodes can see of each failed one
    won_in: int | None = None  # the episode that solved the task
    info: dict[str, Any] = field(default_factory=dict)  # the environment's, after the last turn
    num_shortened: int = 0  # prompts that had to be shortened

    def success_after(self, episodes: int) -> bool:
        """Whether the task was solved within the first `episodes` episodes."""
        return self.won_in is not None and self.won_in < episodes

    def __str__(self) -> str:
        """The trial as a person would read it."""
        outcome = "not solved" if self.won_in is None else f"solved in episode {self.won_in + 1}"
        lines = [f"=== task {self.seed}: {outcome}"]
        for turn in self.turns:
            lines.append(f"--- episode {turn.episode + 1}, {turn.phase}\n{turn.observation}\n>>> {turn.reply}")
            lines[-1] += "" if turn.is_valid else "  [not valid]"
            lines[-1] += f"  [reward {turn.reward:g}]" if turn.phase == "play" else ""
        return "\n".join(lines)

    def rewards(self, kind: str = "env") -> list[list[float]]:
        """Rewards of the play turns, one list per episode played; with "success" 10 for the win and no other."""
        played = [turn for turn in self.turns if turn.phase == "play"]
        wins = [10.0 * (self.won_in is not None and turn is played[-1]) for turn in played]
        rewards = wins if kind == "success" else [turn.reward for turn in played]
        pairs = zip(played, rewards, strict=True)
        return [[reward for _, reward in same] for _, same in groupby(pairs, key=lambda pair: pair[0].episode)]


class Prompt(NamedTuple):
    """What a trial yields: the phase, "play" or "reflect", and the token ids of the prompt."""

    phase: str
    ids: list[int]


class Reply(NamedTuple):
    """What a sampler sends back into a trial."""

    ids: list[int]
    logps: list[float]
    text: str


MEMORIES = ("none", "history", "reflection", "both")


def run_trial(
    env: Env,
    seed: int,
    episodes: int,
    chat: "Chat",
    memory: str = "reflection",
    style: str = "full",
    max_prompt: int = 2048,
    borrowed: Sequence[Episode] | None = None,
) -> Generator[Prompt, Reply, Trial]:
    """Play one trial: yields a Prompt, receives a Reply, returns the Trial.

    `memory` says what later episodes see of a failed one; with "none" the episodes are independent attempts.
    `borrowed` is what they see instead, from a trial of another task: the control that shows whether memory is used.
    """
    trial = Trial(seed, episodes)

    def fit(write: Callable[[int, int], str], length: int) -> list[int]:
        """Encode a prompt; over the limit, first the oldest history goes, then the oldest memory, then the middle."""
        cuts = [(n, 0) for n in range(max(1, length), 0, -1)] + [(1, n + 1) for n in range(len(trial.past))]
        for i, (keep, forget) in enumerate(cuts):
            ids = chat.encode(write(keep, forget))
            if len(ids) <= max_prompt:
                return ids
            trial.num_shortened += i == 0
        half = max_prompt // 2
        return ids[:half] + ids[half - max_prompt :]

    for episode in range(episodes):
        initial, _ = env.reset(seed=seed)
        observation, records, done = initial, [], False
        seen = trial.past if borrowed is None else borrowed[:episode]
        while not done:
            before, anchor = observation, env.anchor()
            ids = fit(partial(play_prompt, env, style, memory, initial, seen, episode, records), env.history_length)
            reply = yield Prompt("play", ids)
            action, is_valid = env.parse(reply.text)
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated or len(records) + 1 >= env.turn_limit
            records.append((str(action), observation, done))
            anchor = before if anchor is None else anchor
            trial.turns.append(Turn(episode, "play", ids, *reply, before, float(reward), is_valid, anchor))
        trial.info = info
        if info.get("won", terminated and reward > 0):
            trial.won_in = episode
        if trial.won_in is not None or episode + 1 == episodes:
            return trial
        reflection = ""
        if memory in ("reflection", "both"):
            ids = fit(partial(reflection_prompt, env, style, initial, episode, records), len(records))
            reply = yield Prompt("reflect", ids)
            reflection, is_valid = parse_reflection(reply.text)
            trial.turns.append(Turn(episode, "reflect", ids, *reply, observation, 0.0, is_valid, "reflection"))
        trial.past.append(Episode(records, reflection))


def parse_reflection(reply: str) -> tuple[str, bool]:
    """The reflection inside <remark> </remark>, cut at 2,000 characters, and whether both tags were there."""
    text = between(reply, "<remark>", "</remark>")
    return (text or "").strip()[:2000], text is not None


# ----------------------------------------------------------------------------------------- the prompts


def format_history(env: Env, records: Records, num_observations: int, length: int) -> str:
    """The last `length` records, the last `num_observations` of them with the whole observation.

    [("(2, 3)", "? 1", False)] -> "Action 1: (2, 3)\\nObservation 1:\\n? 1"
    """
    lines = []
    for i, (action, observation, done) in [*enumerate(records)][-length:]:
        is_last = i >= len(records) - num_observations
        shown = f"\n{observation}" if is_last else f" {env.shorten(observation)}"
        lines.append(f"Action {i + 1}: {action}\nObservation {i + 1}:{shown}")
        if done:
            break
    return "\n".join(lines)


def play_prompt(
    env: Env,
    style: str,
    memory: str,
    initial: str,
    past: Sequence[Episode],
    episode: int,
    records: Records,
    length: int = 7,
    forget: int = 0,
) -> str:
    """The prompt of one play turn: what is fixed first, what changes last, since the sampler re-uses common prefixes.

    "full" asks for reasoning before the action, "direct" for the action alone. "compact" has the same sections in the
    same order for the tiny policy, in a form a small model can learn within minutes: a reflection that redraws a board
    stands at a constant distance from the present board. `length` records are shown of an episode; `forget` leaves out
    the oldest episodes.
    """
    is_compact, blocks = style == "compact", []
    history_of = partial(format_history, env, num_observations=env.history_observations, length=length)
    for number, old in enumerate(past[forget:] if memory != "none" else [], start=forget + 1):
        history = history_of(old.records) if memory in ("history", "both") else ""
        note = old.reflection if memory in ("reflection", "both") else ""
        if is_compact:
            blocks += ["memory", history, note]
        else:
            blocks += [f"Episode {number} did not solve the task."]
            blocks += [history and f"What happened in it:\n{history}"]
            blocks += [note and f"What you noted for the next episodes:\n{note}"]
    options = ["You can choose from: " + ", ".join(admissible)] if (admissible := env.actions()) else []
    if is_compact:
        now = compact_state(env, initial, records, length)
        return join("\n", env.rules("compact"), *blocks, "now", *now, *options, "act")
    so_far = history_of(records)
    blocks += [f"This is episode {episode + 1}, again from the start."] * bool(blocks)
    blocks += [so_far and f"What you did so far in this episode:\n{so_far}"]
    ask = f"{'Give only' if style == 'direct' else 'Think step by step, then give'} {env.action_format}."
    return join("\n\n", env.rules("full"), f"The task at the start:\n{initial}", *blocks, *options, ask)


def reflection_prompt(
    env: Env, style: str, initial: str, episode: int, records: Records, length: int = 7, forget: int = 0
) -> str:
    """The prompt for a reflection on the episode just failed. Earlier ones are not shown, `forget` is idle."""
    if style == "compact":
        now = compact_state(env, initial, records, length)
        return join("\n", env.rules("compact"), initial if env.plans_from_start else "", "now", *now, "reflect")
    return join(
        "\n\n",
        env.rules("full"),
        f"The task at the start:\n{initial}",
        f"Below is episode {episode + 1} of your attempts at this task. It did not solve it.",
        format_history(env, records, length, length),
        "Study it: what went wrong, and what did you find out? Then write what the next episode, from the same start, "
        + "should know and do, briefly, inside <remark> </remark>.",
    )


def compact_state(env: Env, initial: str, records: Records, length: int) -> list[str]:
    """What compact prompts tell of an episode: the last observation, and what else it takes to know the state."""
    if not records:
        return [env.gist(initial)]
    before = [] if env.is_markov else [env.gist(initial), *(action for action, _, _ in records[-length:])]
    return [*before, records[-1][1]]


def join(separator: str, *sections: str) -> str:
    """The sections that are not empty."""
    return separator.join(filter(None, sections))


class Chat:
    """Text to token ids and back, in the model's own chat format.

    The template is rendered once, around a marker; a prompt is then head + content + tail. The content is encoded with
    special tokens switched off, so `<|im_end|>` in a board, a reply or a reflection stays plain text.
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        marker, head, tail = "CONTENT", "", "\n"
        if tokenizer.chat_template:
            # Some templates print today's date: a run resumed tomorrow would differ.
            options = dict(add_generation_prompt=True, enable_thinking=False, date_string="1 January 2026")
            message = [{"role": "user", "content": marker}]
            text = tokenizer.apply_chat_template(message, tokenize=False, **options)
            head, _, tail = text.partition(marker)
        self.head, self.tail = (tokenizer.encode(text, add_special_tokens=False) for text in (head, tail))
        self.backend = getattr(tokenizer, "backend_tokenizer", None)  # twice as fast without what is around it
        if self.backend:
            self.backend.no_truncation()
            self.backend.no_padding()
        # Markers not declared special, such as Qwen3's <think>, are split after their first character to stay text. The
        # tiny policy's pieces are added tokens on purpose.
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special and len(t.content) > 1]
        cuts = [f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in added]
        self.markers = re.compile("|".join(cuts)) if cuts and not tokenizer.init_kwargs.get("is_tiny") else None
        self.stop_ids = {i for i in (*stop_ids, tokenizer.eos_token_id) if i is not None}
        if not self.stop_ids:
            raise ValueError("the tokenizer has no end-of-sequence token, so replies would never end")
        self.vocab_size = len(tokenizer)  # ids from here on exist in the model only as padding, and are never sampled

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one user message, up to and including the start of the answer."""
        return self.head + self.encode_plain(prompt) + self.tail

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of the text alone, with no special tokens whatever it holds."""
        if self.backend is None:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        self.backend.encode_special_tokens = True
        pieces = self.markers.split(text) if self.markers else [text]
        return [i for piece in pieces for i in self.backend.encode(piece, add_special_tokens=False).ids]

    def decode(self, reply_ids: Sequence[int]) -> str:
        """The text of a reply, without its end token."""
        ids = reply_ids[:-1] if reply_ids and reply_ids[-1] in self.stop_ids else reply_ids
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------- the samplers


def uniforms(*key: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on nothing but the key (splitmix64 over its parts).

    Keyed by (seed, step, trial, turn, token), a sampled token depends neither on slots nor on ranks nor on order.
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(part) for part in key)) or (1,), dtype=np.uint64)
    for part in key:
        state = (state ^ np.asarray(part, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass
class Sampling:
    """How tokens are drawn. Training draws from the policy itself: temperature as in the loss, top-p and top-k off."""

    seed: int = 0
    step: int = 0
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0 is off


def pick_tokens(logits: Tensor, uniform: np.ndarray, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`.

    logits (B, V), uniform (B,) -> tokens (B,), log-probabilities (B,) under the distribution drawn from.
    """
    if sampling.temperature == 0:
        logps = logits.float().log_softmax(-1)  # (B, V)
        tokens = logps.argmax(-1)
    else:
        logits = logits.float() / sampling.temperature  # (B, V)
        if 0 < sampling.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -math.inf)
        if sampling.top_p < 1:
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            drop = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token is always kept
            logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
        logps = logits.log_softmax(-1)  # (B, V)
        cumulative = logps.double().exp().cumsum(-1)  # (B, V)
        target = torch.as_tensor(uniform, device=logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


class SlotLayer(CacheLayerMixin):
    """One layer of the key/value cache: a row per slot, preallocated, each row written at its own positions."""

    is_sliding = False

    def __init__(self, view: "SlotCache"):
        super().__init__()
        self.view = weakref.proxy(view)  # a cycle would keep the cache alive until Python's collector happens to run

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.view.num_slots, key_states.shape[1], self.view.capacity
        # zeros, not empty: a masked NaN is still NaN
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])  # (S, H, C, D)
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])  # (S, H, C, D)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) states of the rows in view at their positions; return what these rows hold so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self.view
        self.keys[view.rows[:, None], :, view.positions] = key_states.transpose(1, 2)  # (B, T, H, D)
        self.values[view.rows[:, None], :, view.positions] = value_states.transpose(1, 2)
        return self.keys[view.selected, :, : view.width], self.values[view.selected, :, : view.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.width, 0

    def get_seq_length(self) -> int:
        return 0  # positions are given with every pass

    def get_max_length(self) -> int:
        return self.view.capacity


class SlotCache(Cache):
    """The layers, and which rows, positions and columns the present forward pass works on."""

    def __init__(self, num_layers: int, num_slots: int, capacity: int, device: torch.device):
        self.num_slots, self.capacity, self.device = num_slots, capacity + 1, device  # the last column is scratch
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def look_at(self, rows: Sequence[int], positions: np.ndarray, width: int, dtype: torch.dtype) -> Tensor:
        """Select rows and positions (B, T); returns the additive causal mask (B, 1, T, width)."""
        self.rows = torch.tensor(rows, device=self.device)
        self.selected = slice(len(rows)) if list(rows) == list(range(len(rows))) else self.rows
        self.positions = torch.as_tensor(positions, device=self.device).clamp(max=self.capacity - 1)
        self.width = width
        hidden = torch.arange(width, device=self.device) > self.positions[:, :, None]  # (B, T, width)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a row."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[target, :, :length] = states[source, :, :length]


class Slot:
    """A row of the cache, and the trials that use it, one after the other, as one conversation."""

    def __init__(self, waiting: Iterator[tuple[int, Generator]], finished: list[Trial | None]):
        self.held: list[int] = []  # token ids whose keys and values the row holds
        self.talk = self.play(waiting, finished)
        if prompt := next(self.talk, None):
            self.take(prompt)

    def play(self, waiting: Iterator[tuple[int, Generator]], finished: list[Trial | None]) -> Generator:
        """Play trials as long as some wait; `waiting` is shared with the other slots."""
        for self.index, trial in waiting:
            self.turn = 0  # model calls of this trial so far
            finished[self.index] = yield from trial

    def take(self, prompt: Prompt) -> None:
        """Begin a reply: keep what the row holds of the prompt, the rest is still to be computed."""
        start = common_prefix(self.held, prompt.ids)
        self.held, self.rest = prompt.ids[:start], prompt.ids[start:]
        self.reply: list[int] = []
        self.logps: list[float] = []


class UnsupportedModelError(ValueError):
    """The slot sampler cannot serve this model."""


PREFILL_TOKENS = 8192  # of new prompts computed at once, padding included


class SlotSampler:
    """Plays many trials at once: a fixed number of slots, each a row of one preallocated key/value cache.

    Every pass of the loop gives each live slot one token. A reply that ends goes straight to its trial; of the next
    prompt only what differs from the tokens the slot holds is computed. When a trial ends, the next waiting one takes
    the slot. So no trial waits for a slower one. The cache lives no longer than one `run`: weights change between runs,
    and the update can use its memory.
    """

    def __init__(self, model: Any, chat: Chat, slots: int, max_prompt: int, max_reply: int):
        shape = model.config.get_text_config()
        window = getattr(shape, "sliding_window", None) or math.inf
        layers = set(getattr(shape, "layer_types", None) or ["full_attention"])
        if layers != {"full_attention"} or window < max_prompt + max_reply:
            raise UnsupportedModelError("this model has layers without full attention")
        if model.config._attn_implementation not in ("eager", "sdpa"):
            raise UnsupportedModelError("the slot sampler's mask needs eager or sdpa attention")
        self.model, self.chat, self.num_slots, self.max_reply = model, chat, slots, max_reply
        self.cache_options = shape.num_hidden_layers, slots, max_prompt + max_reply, model.device
        self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Raise where the model does not take cache, mask or positions as given: compare with a plain pass."""
        cache, row, ids = SlotCache(*self.cache_options), Slot(iter(()), []), [*range(1, 7)]
        plain = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0, -1]  # (V)
        try:
            self.forward(cache, [row], [0], [ids[:4]])
            [ours] = self.forward(cache, [row], [0], [ids[4:]])  # (V)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"this model cannot use the slot sampler's cache ({error})") from error
        plain = plain[: len(ours)]
        if (ours - plain).norm() > 0.1 * plain.norm():  # far above what bf16 rounds away
            raise UnsupportedModelError("this model reads a cache in a way of its own")

    @torch.no_grad()
    def run(self, trials: Sequence[Generator], ids: Sequence[int], sampling: Sampling) -> list[Trial]:
        """Play all trials to their end; results in the order of trials. `ids` number them for the random draws."""
        assert not self.model.training, "sampling needs model.eval()"
        cache = SlotCache(*self.cache_options)
        waiting, finished = enumerate(trials), [None] * len(trials)
        slots = [Slot(waiting, finished) for _ in range(min(self.num_slots, len(trials)))]
        while slots:
            new = [row for row, slot in enumerate(slots) if not slot.reply]
            logits = None  # (B, V)
            if len(new) < len(slots):  # all rows, so that the cache is read in place; new ones idle
                logits = self.forward(cache, slots, range(len(slots)), [slot.reply[-1:] for slot in slots])
            # Memory in tokens: what is held is copied to be read, about a quarter of what a new token takes.
            cost = {row: max(len(slots[row].rest), len(slots[row].held) // 4) for row in new}
            for rows in fill_batches(new, PREFILL_TOKENS, cost.__getitem__):
                ready = self.forward(cache, slots, rows, [slots[row].rest for row in rows])
                logits = ready.new_zeros(len(slots), ready.shape[-1]) if logits is None else logits
                logits[rows] = ready
            keys = np.array([(ids[slot.index], slot.turn, len(slot.reply)) for slot in slots]).T
            tokens, logps = pick_tokens(logits, uniforms(sampling.seed, sampling.step, *keys), sampling)
            ended = []
            for row, (slot, token, logp) in enumerate(zip(slots, tokens.tolist(), logps.tolist(), strict=True)):
                slot.reply.append(token)
                slot.logps.append(logp)
                if token in self.chat.stop_ids or len(slot.reply) >= self.max_reply:
                    slot.turn += 1
                    try:
                        slot.take(slot.talk.send(Reply(slot.reply, slot.logps, self.chat.decode(slot.reply))))
                    except StopIteration:
                        ended.append(row)
            for row in reversed(ended):  # keep live slots at the head of the cache, so that decoding reads it in place
                last = slots.pop()
                if row < len(slots):
                    cache.move_row(len(slots), row, len(last.held))
                    slots[row] = last
        return finished

    def forward(
        self, cache: SlotCache, slots: Sequence[Slot], rows: Sequence[int], new: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits (B, V) after the new tokens of these rows, which from now on hold them.

        The padding of a short row, and of a row without new tokens, is written behind what the row holds, where later
        tokens overwrite it before it is ever seen.
        """
        tokens = pad(new).to(self.model.device)  # (B, T)
        positions = np.array([len(slots[row].held) for row in rows])[:, None] + np.arange(tokens.shape[1])  # (B, T)
        for row, added in zip(rows, new, strict=True):
            slots[row].held += added
        longest = max(len(slots[row].held) for row, added in zip(rows, new, strict=True) if added)
        width = min(-(-longest // 32) * 32, cache.capacity)  # few distinct widths keep the allocator calm
        mask = cache.look_at(rows, positions, width, self.model.dtype)
        hidden = self.model.get_decoder()(
            input_ids=tokens,
            position_ids=cache.positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (B, T, h)
        last = hidden[range(len(rows)), [len(added) - 1 for added in new]]  # (B, h)
        return self.model.get_output_embeddings()(last)[:, : self.chat.vocab_size]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix, short of the whole of `b`: at least one token must be computed."""
    limit = min(len(a), len(b) - 1)
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def pad(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Pad to a rectangle with id 0; padding is told by length, never by id. [[5, 6], [7]] -> [[5, 6], [7, 0]]"""
    width = max(len(row) for row in rows)
    fill = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)])


def fill_batches(items: Iterable, max_tokens: int, length: Callable[[Any], int]) -> list[list]:
    """Items sorted by length and cut so that each padded rectangle holds at most max_tokens (or one item)."""
    batches: list[list] = []
    for item in sorted(items, key=length):
        if not batches or (len(batches[-1]) + 1) * length(item) > max_tokens:  # the longest so far, since sorted
            batches.append([])
        batches[-1].append(item)
    return batches


class GenerateSampler:
    """The plain reference: `model.generate`, trials in lock-step over turns. Draws the same tokens as SlotSampler."""

    def __init__(self, model: Any, chat: Chat, slots: int, max_prompt: int, max_reply: int):
        self.model, self.chat, self.num_slots, self.max_reply = model, chat, slots, max_reply

    @torch.no_grad()
    def run(self, trials: Sequence[Generator], ids: Sequence[int], sampling: Sampling) -> list[Trial]:
        """Play all trials to their end; see SlotSampler.run."""
        finished: list[Trial | None] = [None] * len(trials)
        prompts, turn = {i: next(trial).ids for i, trial in enumerate(trials)}, 0
        while prompts:
            live = list(prompts)
            for start in range(0, len(live), self.num_slots):
                batch = live[start : start + self.num_slots]
                draw = DrawTokens(np.array([ids[i] for i in batch]), turn, sampling, self.chat.vocab_size)
                for i, reply in zip(batch, self.generate([prompts[i] for i in batch], draw), strict=True):
                    try:
                        prompts[i] = trials[i].send(reply).ids
                    except StopIteration as stop:
                        finished[i] = stop.value
                        del prompts[i]
            turn += 1
        return finished

    def generate(self, prompts: Sequence[Sequence[int]], draw: "DrawTokens") -> Iterator[Reply]:
        """Reply to every prompt."""
        tokens = pad(prompts, left=True).to(self.model.device)  # (B, L)
        is_content = pad([[1] * len(prompt) for prompt in prompts], left=True).to(self.model.device)  # (B, L)
        plain = GenerationConfig(  # not the model's own: a repetition penalty, say, would make it another policy
            do_sample=False, max_new_tokens=self.max_reply, eos_token_id=sorted(self.chat.stop_ids), pad_token_id=0
        )
        self.model.generate(
            tokens, attention_mask=is_content, generation_config=plain, logits_processor=LogitsProcessorList([draw])
        )
        sampled, sampled_logps = torch.stack(draw.tokens, 1).tolist(), torch.stack(draw.logps, 1).tolist()
        for row, logps in zip(sampled, sampled_logps, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in self.chat.stop_ids), len(row))
            yield Reply(row[:end], logps[:end], self.chat.decode(row[:end]))


class DrawTokens(LogitsProcessor):
    """Makes greedy `generate` emit the tokens that `pick_tokens` draws, and keeps them."""

    def __init__(self, ids: np.ndarray, turn: int, sampling: Sampling, vocab_size: int):
        self.ids, self.turn, self.sampling, self.vocab_size = ids, turn, sampling, vocab_size
        self.tokens: list[Tensor] = []
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = uniforms(self.sampling.seed, self.sampling.step, self.ids, self.turn, len(self.tokens))
        tokens, logps = pick_tokens(scores[:, : self.vocab_size], uniform, self.sampling)
        self.tokens.append(tokens)
        self.logps.append(logps)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens[:, None], 0.0)


# ------------------------------------------------------------------------------ returns and advantages


def discounted(rewards: Sequence[float], gamma_step: float, tail: float = 0.0) -> list[float]:
    """Discounted sums from every turn on; `tail` stands in the place of a next return at the last turn, undiscounted.

    discounted([0, 0, 10], 0.5) == [2.5, 5.0, 10.0]
    """
    returns = []
    for reward in reversed(rewards):
        tail = reward + (gamma_step * tail if returns else tail)
        returns.append(tail)
    return returns[::-1]


def cross_episode_returns(
    rewards: Sequence[Sequence[float]], credit: str, gamma_step: float, gamma_traj: float
) -> list[list[float]]:
    """G_t(n) of every play turn, for rewards[n][t] (README, equations 1 and 2; official: its recursion).

    paper:    G_t(n) = g_t(n) + sum_{m>n} gamma_traj^(m-n) g_0(m)
    official: one recursion, so that gamma_step also discounts what comes from later episodes
    """
    returns: list[list[float]] = []
    later = 0.0  # gamma_traj-discounted value of all that follows the episode
    for episode in reversed(rewards):
        if credit == "official":
            returns.append(discounted(episode, gamma_step, later))
        else:
            returns.append([g + later for g in discounted(episode, gamma_step)])
        later = gamma_traj * returns[-1][0]
    return returns[::-1]


def compute_returns(
    trials: Iterable[Trial],
    credit: str,
    gamma_step: float,
    gamma_traj: float,
    invalid_penalty: float = 0.5,
    reward: str = "env",
) -> None:
    """Set `ret` of every turn: the cross-episode return; a reflection gets G_0 of the episode it prepares.

    With `reward` "success" nothing but the win counts, with 10. Where early rewards are kept and a trial ends at the
    first win, a large gamma_traj can pay for putting the win off; this is the control.
    """
    for trial in trials:
        returns = cross_episode_returns(trial.rewards(reward), credit, gamma_step, gamma_traj)
        played = chain.from_iterable(returns)
        for turn in trial.turns:
            turn.penalty = invalid_penalty * (not turn.is_valid)
            turn.ret = (next(played) if turn.phase == "play" else returns[turn.episode + 1][0]) - turn.penalty


def center(values: Sequence[float], norm: str = "mean") -> list[float]:
    """Values minus their mean, for "mean_std" also divided by (std + 1e-6), for "leave_one_out" minus the others' mean.

    A set of one gives 0, never NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or array.max() == array.min():
        return [0.0] * len(array)
    array = array - array.mean()
    scale = {"mean": 1.0, "leave_one_out": len(array) / (len(array) - 1)}
    return (array * scale[norm] if norm in scale else array / (array.std(ddof=1) + 1e-6)).tolist()


ESTIMATORS = ("reinforce", "rloo", "grpo", "gigpo", "ppo")
NORM_OF = {"rloo": "leave_one_out", "grpo": "mean_std"}  # what these are; the others take `norm`


def sets_by(key: Callable[[Turn], Any], turns: Iterable[Turn]) -> Iterable[list[Turn]]:
    """The turns in sets of equal key."""
    sets = defaultdict(list)
    for turn in turns:
        sets[key(turn)].append(turn)
    return sets.values()


def compute_advantages(
    groups: Iterable[Sequence[Trial]], estimator: str, norm: str = "mean", step_weight: float = 1.0
) -> None:
    """Set `advantage` of every turn; a group is the trials of one task.

    Episode and phase are part of every key: memory differs between episodes, so equal boards are not equal states, and
    a baseline over all episodes would punish the very action that made the next one succeed.

    reinforce: G minus its mean over the rows of the group with the same episode and phase; rloo: minus the mean of the
               others; grpo: also divided by the standard deviation.
    gigpo:     E + step_weight * P. E: the member's G_0(n) minus the mean over members that played episode n, 0 for
               reflections. P: G minus its mean over rows with the same episode, phase and anchor.
    ppo:       see `ppo_advantages`.
    """
    norm, is_gigpo = NORM_OF.get(estimator, norm), estimator == "gigpo"
    for group in groups:
        turns = [turn for trial in group for turn in trial.turns]
        for same in sets_by(lambda turn: (turn.episode, turn.phase, turn.anchor if is_gigpo else ""), turns):
            for turn, value in zip(same, center([turn.ret for turn in same], norm), strict=True):
                turn.advantage = step_weight * value if is_gigpo else value
        for episode in {turn.episode for turn in turns} if is_gigpo else ():
            played = [[t for t in trial.turns if (t.episode, t.phase) == (episode, "play")] for trial in group]
            played = [rows for rows in played if rows]
            # G_0(n) as the environment paid it: an invalid first reply is penalised in P, on its own row
            values = center([rows[0].ret + rows[0].penalty for rows in played], norm)
            for rows, value in zip(played, values, strict=True):
                for turn in rows:
                    turn.advantage += value


def official_advantages(
    groups: Iterable[Sequence[Trial]], estimator: str, norm: str = "mean", step_weight: float = 1.0, reward: str = "env"
) -> None:
    """Set `advantage` of every turn as the official code does (facts/games.md 4): a group's rows in one pot.

    E compares the plain reward of the turn's episode (0 for a reflection) minus the penalty with that of all rows of
    the group, so the return across episodes reaches only gigpo's P, which pools equal anchors of all episodes and
    knows no penalty. A group of one row keeps its score.
    """
    norm = NORM_OF.get(estimator, norm)
    for group in groups:
        turns, scores = [turn for trial in group for turn in trial.turns], []
        for trial in group:
            rewards = [sum(episode) for episode in trial.rewards(reward)]
            scores += [rewards[t.episode] * (t.phase == "play") - t.penalty for t in trial.turns]
        for turn, value in zip(turns, center(scores, norm) if len(turns) > 1 else scores, strict=True):
            turn.advantage = value
        for same in sets_by(lambda turn: turn.anchor, turns) if estimator == "gigpo" else ():
            for turn, value in zip(same, center([t.ret + t.penalty for t in same], norm), strict=True):
                turn.advantage += step_weight * value


def ppo_advantages(trials: Iterable[Trial], gamma_step: float, gamma_traj: float, gae_lambda: float = 1.0) -> None:
    """Set `advantage` of every turn from its value: the generalised advantage estimate along the trial's turns.

    A turn's discount to the next is gamma_step inside an episode, gamma_traj at its end, 1 from a reflection to the
    episode it prepares. With lambda 1 that is G - V, for either credit; below 1 it needs credit "official", the one
    that is a recursion. A penalty stays with its row, but values are learned with it.
    """
    for trial in trials:
        advantage = ret_after = value_after = gamma = 0.0
        for turn, after in reversed([*zip(trial.turns, [*trial.turns[1:], None], strict=True)]):
            if after is not None:
                inside = after.episode == turn.episode and after.phase == "play"
                gamma = gamma_step if inside else 1.0 if turn.phase == "reflect" else gamma_traj
            ret = turn.ret + turn.penalty
            reward = ret - gamma * ret_after
            advantage = reward + gamma * value_after - turn.value + gamma * gae_lambda * advantage
            turn.advantage = advantage - turn.penalty
            ret_after, value_after = ret, turn.value


# ------------------------------------------------------------------------------------------ the update


def reply_logps(
    model: Any,
    turns: Sequence[Turn],
    temperature: float,
    vocab_size: int,
    need_entropy_grad: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of all reply tokens of the turns in order (T,), the entropies they were drawn from (T,), and
    for a value head the `prompt_states` (B, h).

    Sequences are padded on the right, so causal attention needs no mask. Only hidden states that predict reply tokens
    reach the output layer, in chunks that are recomputed in the backward pass: logits of the whole batch never exist.
    """
    tokens = pad([turn.prompt_ids + turn.reply_ids for turn in turns]).to(model.device)  # (B, L)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state  # (B, L, h)
    states = prompt_states(hidden, turns)  # (B, h)
    rows = [row for row, turn in enumerate(turns) for _ in turn.reply_ids]
    columns = [len(turn.prompt_ids) - 1 + i for turn in turns for i in range(len(turn.reply_ids))]
    targets = torch.tensor([token for turn in turns for token in turn.reply_ids], device=model.device)  # (T,)
    hidden = hidden[rows, columns]  # (T, h)

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logps = (head(hidden)[:, :vocab_size].float() / temperature).log_softmax(-1)  # (C, V)
        with torch.set_grad_enabled(torch.is_grad_enabled() and need_entropy_grad):
            entropy = -(logps.exp() * logps).sum(-1)  # (C,)
        return logps.gather(-1, targets[:, None])[:, 0], entropy

    chunk = chunk or max(1, 2**26 // vocab_size)  # 256 MB of fp32 logits at a time
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    logps, entropies = zip(*(checkpoint(score, *piece, use_reentrant=False) for piece in chunks), strict=True)
    return torch.cat(logps), torch.cat(entropies), states


def prompt_states(hidden: Tensor, turns: Sequence[Turn]) -> Tensor:
    """The hidden states of the prompts' last tokens in fp32, detached: (B, L, h) -> (B, h)."""
    return hidden[range(len(turns)), [len(turn.prompt_ids) - 1 for turn in turns]].detach().float()


@torch.no_grad()
def compute_values(model: Any, value_head: Any, trials: Iterable[Trial], microbatch_tokens: int = 16384) -> None:
    """Set `value` of every turn: a linear head (h -> 1) on the state after its prompt."""
    for batch in micro_batches([turn for trial in trials for turn in trial.turns], microbatch_tokens):
        tokens = pad([turn.prompt_ids for turn in batch]).to(model.device)  # (B, L)
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state  # (B, L, h)
        for turn, value in zip(batch, value_head(prompt_states(hidden, batch))[:, 0].tolist(), strict=True):
            turn.value = value


def clipped_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective per token, as a loss, and where `clip` was active: (T,), (T,) bool.

    `clip_high` is the upper range where it differs. `dual_clip` c > 1 also bounds the loss of a token with negative
    advantage by -c A, however likely it has become; 0 is off.
    """
    ratio = (logps - old_logps).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    losses = torch.maximum(plain, clipped)
    if dual_clip:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, clipped > plain


KL_ESTIMATES = ("k1", "k2", "k3")


def kl_estimate(logps: Tensor, reference: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy drew (Schulman 2020).

    k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d with d = logps - reference. As a loss k2 has KL's gradient, k3 nearly so;
    k1's is zero on average, it is here for comparisons. k3 is capped at 10, as in the official code.
    """
    d = logps - reference
    return {"k1": d, "k2": d * d / 2, "k3": (torch.expm1(-d) + d).clamp(max=10)}[kind]


def micro_batches(turns: Iterable[Turn], max_tokens: int) -> list[list[Turn]]:
    """Turns in batches of at most max_tokens, padding included."""
    return fill_batches(turns, max_tokens, lambda turn: len(turn.prompt_ids) + len(turn.reply_ids))


def count_tokens(turns: Iterable[Turn]) -> int:
    """Reply tokens, the ones that are trained."""
    return sum(len(turn.reply_ids) for turn in turns)


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum numbers over all processes; the same list where there is only one."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


class Optimizer:
    """AdamW on fp32 masters of the weights, sharded: every process updates the weights it owns and hands them out.

    A step of 1e-6 on a bf16 weight rounds to nothing, hence the masters; for an fp32 model they are the weights
    themselves. Gradients are kept in fp32 and summed over processes once per optimizer step, after all micro-batches,
    so processes may have different numbers of these; summed, not averaged, as the loss is divided by a global token
    count. Masters and moments, 12 bytes a weight, exist once among all processes.
    """

    def __init__(
        self,
        model: Any,
        lr: float,
        dtype: torch.dtype = torch.float32,
        value_head: torch.nn.Module | None = None,
        value_lr: float = 1e-3,
        **adamw: Any,
    ):
        """Takes an fp32 model and turns its weights into `dtype`; a value head stays in fp32. `adamw`: its options."""
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.policy = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = {f"value_head.{name}": p for name, p in value_head.named_parameters()} if value_head else {}
        self.weights = self.policy | head
        self.owner, load = {}, [0] * self.world  # the largest weights first, each to the process that has least
        for name, weight in sorted(self.weights.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += weight.numel()
        self.masters: dict[str, Tensor] = {}  # of the weights this process owns
        self.grads: dict[str, Tensor] = {}  # fp32, of the optimizer step in progress
        for name, weight in self.weights.items():
            if self.owner[name] == self.rank:
                is_master = dtype == torch.float32 or name in head
                self.masters[name] = weight if is_master else weight.detach().clone()
            if name in self.policy:  # not model.to(dtype): rotary frequencies must stay fp32
                weight.data = weight.data.to(dtype)
            weight.register_post_accumulate_grad_hook(partial(self.accumulate, name))
        groups = [
            {"params": [p for name, p in self.masters.items() if name in self.policy]},
            {"params": [p for name, p in self.masters.items() if name in head], "lr": value_lr, "weight_decay": 0.0},
        ]
        # fused: the default on a GPU makes temporary copies as large as a moment
        defaults = dict(weight_decay=0.0, fused=model.device.type == "cuda")
        self.adamw = torch.optim.AdamW(groups, lr=lr, **defaults | adamw)

    def accumulate(self, name: str, weight: Tensor) -> None:
        """Move a weight's fresh gradient into its fp32 sum."""
        self.grads[name] = self.grads[name].add_(weight.grad) if name in self.grads else weight.grad.float()
        weight.grad = None

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Sum gradients over processes, clip the policy's to max_norm, update; returns the norm before clipping."""
        squares, head_squares = [torch.zeros(())], [torch.zeros(())]
        for name, weight in self.weights.items():
            grad = self.grads.pop(name) if name in self.grads else torch.zeros_like(weight, dtype=torch.float32)
            if self.world > 1:
                dist.reduce(grad, self.owner[name])
            if name in self.masters:
                self.masters[name].grad = grad
                (squares if name in self.policy else head_squares).append(grad.square().sum().cpu())
        sums = [torch.stack(each).sum().item() for each in (squares, head_squares)]
        square, head_square = all_reduce_sum(sums, weight.device)
        norm = math.sqrt(square)
        if not math.isfinite(norm + head_square):  # the same on every process; a broken step must not reach the weights
            self.adamw.zero_grad()
            return norm
        for name, master in self.masters.items():
            master.grad.mul_(min(1.0, max_norm / (norm + 1e-6)) if name in self.policy else 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        for name, weight in self.weights.items():
            if name in self.masters and weight is not self.masters[name]:
                weight.copy_(self.masters[name])
            if self.world > 1:
                dist.broadcast(weight.data, self.owner[name])
        return norm

    @torch.no_grad()
    def state(self) -> dict[str, dict[str, Tensor]]:
        """By weight name: fp32 master, AdamW's moments and step. All processes must call it; process 0 gets it all."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, weight in self.weights.items():
            own = self.adamw.state.get(self.masters.get(name), {}) | {"master": self.masters.get(name)}
            state[name] = {}
            for part in ("master", "exp_avg", "exp_avg_sq", "step"):
                value = own.get(part)
                if value is None:
                    shape = () if part == "step" else weight.shape
                    value = torch.zeros(shape, dtype=torch.float32, device=weight.device)
                value = value.to(weight.device)
                if self.world > 1:
                    dist.broadcast(value, self.owner[name])
                if self.rank == 0:
                    state[name][part] = value.detach().cpu()
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up what `state` gave, on any number of processes. The policy's masters come with its weights."""
        for name, master in self.masters.items():
            device = {"step": master.device if self.adamw.defaults["fused"] else "cpu"}  # as AdamW itself keeps them
            parts = ("step", "exp_avg", "exp_avg_sq")
            self.adamw.state[master] = {k: state[name][k].to(device.get(k, master.device), copy=True) for k in parts}
        for name, weight in self.weights.items():
            if name not in self.policy:
                weight.copy_(state[name]["master"])


def named_like(model: Any, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state with these tensors in place of its weights, under all names that share one (tied layers)."""
    by_address = {weight.data_ptr(): masters[name] for name, weight in model.named_parameters() if name in masters}
    return {name: by_address.get(value.data_ptr(), value) for name, value in model.state_dict().items()}


@torch.no_grad()
def logps_before(
    model: Any, turns: Sequence[Turn], temperature: float, vocab_size: int, microbatch_tokens: int
) -> tuple[dict[int, Tensor], float]:
    """By id(turn), the log-probabilities (T,) that ratios are measured against, and how far they are from the sampled.

    In fp32 they are the sampled ones. A bf16 decoder and a bf16 trainer differ: there they are the trainer's.
    """
    sampled = {id(turn): torch.tensor(turn.logps, device=model.device) for turn in turns}
    if model.dtype == torch.float32:
        return sampled, 0.0
    before, gap = {}, 0.0
    for batch in micro_batches(turns, microbatch_tokens):
        logps, _, _ = reply_logps(model, batch, temperature, vocab_size)
        for turn, new in zip(batch, logps.split([len(turn.reply_ids) for turn in batch]), strict=True):
            before[id(turn)] = new
            gap += (new - sampled[id(turn)]).abs().sum().item()
    return before, gap


def update(
    model: Any,
    optimizer: Optimizer,
    trials: Sequence[Trial],
    ids: Sequence[int],
    sampling: Sampling,
    vocab_size: int,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = 0.0,
    entropy_bonus: float = 0.0,
    kl_coef: float = 0.0,
    kl: str = "k3",
    reference: Any = None,
    value_head: Any = None,
    minibatch: int = 64,
    microbatch_tokens: int = 16384,
    grad_clip: float = 1.0,
) -> dict[str, float]:
    """One pass of clipped policy-gradient steps over the turns of this process' trials.

    Every reply token of a turn carries the turn's advantage. A mini-batch of about `minibatch` turns (over all
    processes) is one optimizer step; which one a turn belongs to depends only on (seed, step, trial, turn). The loss
    is a sum over tokens divided by the mini-batch's global token count, so neither micro-batches nor the number of
    processes change the result. With a `reference` model, kl_coef times the KL estimate to it is added; a `value_head`
    learns by half the squared error to advantage + value, meaned over turns.
    """
    device = model.device
    turns = [turn for trial in trials for turn in trial.turns]
    keys = [(i, number) for trial, i in zip(trials, ids, strict=True) for number in range(len(trial.turns))]
    num_turns, num_tokens = all_reduce_sum([len(turns), count_tokens(turns)], device)
    minibatches: list[list[Turn]] = [[] for _ in range(max(1, round(num_turns / minibatch)))]
    for turn, u in zip(turns, uniforms(sampling.seed, sampling.step, *np.array(keys).T, 1 << 40), strict=True):
        minibatches[int(u * len(minibatches))].append(turn)

    model.train()
    old_logps, gap = logps_before(model, turns, sampling.temperature, vocab_size, microbatch_tokens)
    names = ("loss", "entropy", "clip_fraction", "kl", "kl_start", "value_loss")
    sums, norms = torch.zeros(len(names), dtype=torch.float64, device=device), []
    for rows in minibatches:
        count, num_rows = all_reduce_sum([count_tokens(rows), len(rows)], device)
        if count == 0:
            continue
        for batch in micro_batches(rows, microbatch_tokens):
            logps, entropy, states = reply_logps(model, batch, sampling.temperature, vocab_size, entropy_bonus > 0)
            old = torch.cat([old_logps[id(turn)] for turn in batch])  # (T,)
            advantages = torch.tensor([t.advantage for t in batch for _ in t.reply_ids], device=device)  # (T,)
            losses, is_clipped = clipped_loss(logps, old, advantages, clip, clip_high, dual_clip)
            loss = losses.sum() - entropy_bonus * entropy.sum()
            kl_start = value_loss = torch.zeros((), device=device)
            if reference is not None:
                with torch.no_grad():
                    start, _, _ = reply_logps(reference, batch, sampling.temperature, vocab_size)
                kl_start = kl_estimate(logps, start, kl).sum()
            if value_head is not None:
                targets = torch.tensor([turn.advantage + turn.value for turn in batch], device=device)  # (B,)
                value_loss = (value_head(states)[:, 0] - targets).square().sum() / 2
            ((loss + kl_coef * kl_start) / count + value_loss / num_rows).backward()
            with torch.no_grad():
                change = logps - old
                kl_step = change.expm1() - change  # k3 of KL(sampler || policy): its tokens are the sampler's
                logged = [losses.sum(), entropy.sum(), is_clipped.sum(), kl_step.sum(), kl_start, value_loss]
                sums += torch.stack(logged).double()
        norms.append(optimizer.step(grad_clip))
    model.eval()
    sums[-1] *= num_tokens / num_turns  # all others are means over tokens
    means = [total / num_tokens for total in all_reduce_sum([*sums.tolist(), gap], device)]
    stats = dict(zip([*names, "sampler_gap"], means, strict=True))
    done = [norm for norm in norms if math.isfinite(norm)]
    return stats | {"grad_norm": sum(done) / max(1, len(done)), "updates": len(done), "skipped": len(norms) - len(done)}
