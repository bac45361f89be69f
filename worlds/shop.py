"""A web shop: search a catalogue, open the items that may fit, and buy one."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from envs import (
    COLUMNS,
    Call,
    Effect,
    World,
    bounded,
    choose,
    tool_schema,
    write_turn,
)

KINDS = ("shirt", "coat", "scarf", "hat", "bag", "rug")
COLOURS = ("red", "blue", "green", "black", "white")
MATERIALS = ("cotton", "wool", "linen", "silk")
SIZES = ("S", "M", "L")
PLACES = ("first", "second", "third")  # what texts call the items that a search lists


class Item(NamedTuple):
    code: str
    title: str
    material: str
    sizes: tuple[str, ...]
    price: int


class Shop(World):
    """Find, inspect and buy the item that an instruction asks for, in a small web shop in the
    spirit of WebShop.

    The catalogue is made from the seed. One item is made to fit. Two more have the same title (its
    colour and kind), but their material, sizes and price are drawn at random. The rest have other
    titles. A search looks at titles only, and an item has to be opened to show its material and
    sizes. Any purchase ends the episode. It earns 1 if title, material, size and price all fit,
    which is success, and otherwise half of the share of these four that fit. Raises ValueError for
    options out of bounds.
    """

    unit = "turn"
    skill = 0.55
    filler = """A title has a colour and a kind. I cannot see the material before I open an item.
        Sizes are shown only inside. A cheap item is no use if it does not fit. The price must stay
        in the budget. I can buy only once. Searching by both words gives the best list. Several
        items share a title. Opening an item costs a turn. I should not buy blindly. All wishes have
        to be met. What fails on one point is out. The list is short, so I read it all. If nothing
        fits, another search is needed."""

    def __init__(self, items: int = 30, turns: int = 8, thoughts: int = 4):
        super().__init__(limit=turns, thoughts=thoughts)
        bounded(items=(items, 8, 80), turns=(turns, 3, 40))
        self.items = items
        text = {"type": "string"}
        size = {"type": "string", "enum": list(SIZES)}
        self.tools = [
            tool_schema("search", "List items by words of their title.", {"query": text}),
            tool_schema("open", "See material and sizes of an item.", {"item": text}),
            tool_schema("buy", "Buy an item and leave.", {"item": text, "size": size}),
        ]
        self.system = (
            f"You shop. A title is a colour and a kind. A search lists at most {len(PLACES)} items "
            "by code, title and price; opening an item shows its material and sizes. Buy once, in "
            f"{turns} turns: the reward is 1 if title, material, size and price all are as wanted, "
            f"else half of the share of these four that are. {self.rules}"
        )

    def _lay_out(self, seed: int) -> None:
        rng = random.Random(f"shop {seed}")
        titles = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
        self.title = rng.choice(titles)
        self.material = rng.choice(MATERIALS)
        self.size = rng.choice(SIZES)
        self.budget = rng.randrange(30, 80, 10)
        others = [title for title in titles if title != self.title]
        same = [self.title] * len(PLACES)
        titles_of_items = same + [rng.choice(others) for _ in range(self.items - len(same))]
        codes = [f"{letter}{digit}" for letter in COLUMNS for digit in range(1, 10)]
        items = []
        for code, title in zip(rng.sample(codes, self.items), titles_of_items, strict=True):
            sizes = tuple(size for size in SIZES if rng.random() < 0.6) or (rng.choice(SIZES),)
            material = rng.choice(MATERIALS)
            items.append(Item(code, title, material, sizes, price=rng.randrange(10, 100, 10)))
        # The first item is made to fit.
        sizes = tuple(size for size in SIZES if size in items[0].sizes or size == self.size)
        price = rng.randrange(10, self.budget + 10, 10)
        items[0] = items[0]._replace(material=self.material, sizes=sizes, price=price)
        self.catalogue = {item.code: item for item in sorted(items)}
        self.results: list[Item] = []  # what the last search listed
        self.opened: set[str] = set()  # the codes of the items that were opened

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn that states true facts about the list, and with probability `skill` calls the best
        tool: buy an item that fits; if none is known to fit, open one that may; if there is none
        either, search for the whole title. Otherwise it does what a careless person may do: search
        for one word of the title, open any item of the list, or buy any of them in any size.
        """
        careless = [Call("search", {"query": rng.choice(self.title.split())})]
        if self.results:
            code = rng.choice(self.results).code
            careless.append(Call("open", {"item": code}))
            careless.append(Call("buy", {"item": code, "size": rng.choice(SIZES)}))
        thought = self._think(self._facts(rng), rng)
        name, arguments = choose(rng, skill, self._best_calls(), careless)
        return write_turn(thought, name, arguments)

    def _best_calls(self) -> list[Call]:
        verdicts = self._verdicts()
        fitting = [code for code in verdicts if verdicts[code] == "fits"]
        possible = [code for code in verdicts if verdicts[code] == "may fit"]
        if fitting:
            return [Call("buy", {"item": code, "size": self.size}) for code in fitting]
        if possible:
            return [Call("open", {"item": code}) for code in possible]
        return [Call("search", {"query": self.title})]

    def choices(self) -> tuple[list[Call], list[Call]]:
        """The best calls of this turn, and these together with all careless ones: a search for one
        word of the title, and to open or to buy, in any size, any item of the list."""
        best = self._best_calls()
        options = [Call("search", {"query": word}) for word in self.title.split()]
        for item in self.results:
            options.append(Call("open", {"item": item.code}))
            options += [Call("buy", {"item": item.code, "size": size}) for size in SIZES]
        return best, [call for call in best if call not in options] + options

    def _facts(self, rng: random.Random) -> list[str]:
        """What is wanted, and what is known of each item of the list."""
        want = rng.choice(["I want", "I look for"])
        wish = f"{want} a {self.title} of {self.material}, size {self.size}, up to {self.budget}."
        if not self.results:
            return [wish, "The list is empty."]
        verdicts = zip(PLACES, self._verdicts().items(), strict=False)
        known = ", ".join(f"{place} {code} {verdict}" for place, (code, verdict) in verdicts)
        return [wish, f"{rng.choice(['Of these', 'Here'])} {known}."]

    def _verdicts(self) -> dict[str, str]:
        """What is known of every item of the list, by code: that it "fits", that it "may fit" as
        long as it has not been opened, or the first property that it "fails on"."""
        verdicts = {}
        for item in self.results:
            verdict = "may fit"
            met = {"title": item.title == self.title, "price": item.price <= self.budget}
            if item.code in self.opened:
                verdict = "fits"
                met["material"] = item.material == self.material
                met["size"] = self.size in item.sizes
            failing = [f"fails on {name}" for name, holds in met.items() if not holds]
            verdicts[item.code] = failing[0] if failing else verdict
        return verdicts

    def _truths(self) -> dict[str, set[str]]:
        verdicts = self._verdicts()
        listed = "|".join(verdicts) or "none"
        known = {rf"\b{code} (fits|may fit|fails on \w+)": {verdicts[code]} for code in verdicts}
        return known | {
            r"(?:want|look for) a (\w+ \w+)": {self.title},
            r"of (\w+), size": {self.material},
            r"size (\w)\b": {self.size},
            r"up to (\d+)": {str(self.budget)},
            r"The list is (empty)": set() if self.results else {"empty"},
            # Nothing is known of items that are not in the list, so any such statement is false.
            rf"\b((?!{listed})[a-i][1-9] (?:fits|may fit|fails on \w+))": set(),
        }

    def _play(self, call: Call) -> Effect:
        if call.name == "search":
            return self._search(call.arguments["query"])
        item = self.catalogue.get(call.arguments["item"])
        if item not in self.results:
            return Effect("The list has no such item.")
        if call.name == "buy":
            return self._buy(item, call.arguments["size"])
        self.opened.add(item.code)
        return Effect(f"You opened {item.code}.")

    def _search(self, query: str) -> Effect:
        words = set(re.findall(r"[a-z]+", query.lower()))
        matches = {item: len(words & set(item.title.split())) for item in self.catalogue.values()}
        ranked = sorted(matches, key=lambda item: (-matches[item], item.code))
        self.results = [item for item in ranked if matches[item] > 0][: len(PLACES)]
        if not self.results:
            return Effect("No title has any of these words.")
        return Effect(f"Found {len(self.results)}.")

    def _buy(self, item: Item, size: str) -> Effect:
        if size not in item.sizes:
            return Effect(f"{item.code} is not to be had in size {size}.")
        wishes = [
            item.title == self.title,
            item.price <= self.budget,
            item.material == self.material,
            size == self.size,
        ]
        success = all(wishes)
        reward = 1.0 if success else 0.5 * wishes.count(True) / len(wishes)
        message = f"You bought {item.code} in size {size}."
        return Effect(message, reward, finished=True, success=success)

    def _show(self) -> list[str]:
        lines = []
        for place, item in zip(PLACES, self.results, strict=False):
            inside = f" {item.material} {' '.join(item.sizes)}" if item.code in self.opened else ""
            lines.append(f"- {place} {item.code} {item.title} ${item.price}{inside}")
        wanted = f"{self.title}, {self.material}, size {self.size}, at most ${self.budget}"
        return [*lines, f"Wanted: {wanted}. Turns left {self.turns_left}"]
