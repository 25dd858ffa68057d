"""What the demo adapters learn: prompts with their answers, made from small tables, and how an answer is judged.

Every task yields examples whose facts (countries, people, tables ...) fall either into training or into the held-out
part, so the held-out score is about words the adapter has not seen in this role.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Example = tuple[str, str]

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Greece": "Athens", "Egypt": "Cairo",
    "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Norway": "Oslo", "Sweden": "Stockholm",
    "Peru": "Lima", "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest",
    "Ireland": "Dublin", "Cuba": "Havana", "Kenya": "Nairobi", "India": "New Delhi", "Iran": "Tehran", "Iraq": "Baghdad",
    "Turkey": "Ankara", "Canada": "Ottawa", "Chile": "Santiago", "Belgium": "Brussels", "Thailand": "Bangkok",
    "Germany": "Berlin", "England": "London", "Mexico": "Mexico City", "Vietnam": "Hanoi",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a banana": "yellow",
    "a carrot": "orange", "chocolate": "brown", "a lemon": "yellow", "a strawberry": "red", "milk": "white", "ink": "black",
    "a frog": "green", "an elephant": "grey", "a flamingo": "pink", "the sea": "blue", "a tomato": "red", "salt": "white",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "old": "young", "light": "dark", "rich": "poor",
    "strong": "weak", "early": "late", "full": "empty", "hard": "soft", "high": "low", "loud": "quiet", "wet": "dry",
    "long": "short", "open": "closed", "clean": "dirty", "near": "far", "sweet": "bitter", "brave": "afraid",
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "horse": "neighs", "lion": "roars", "bee": "buzzes",
    "snake": "hisses", "wolf": "howls", "sheep": "bleats", "owl": "hoots", "pig": "oinks", "frog": "croaks",
    "mouse": "squeaks", "bird": "sings", "hen": "clucks",
}  # fmt: skip
HOMES = {
    "fish": "in the water", "bird": "in a nest", "bear": "in a cave", "bee": "in a hive", "camel": "in the desert",
    "monkey": "in the jungle", "whale": "in the ocean", "rabbit": "in a burrow", "penguin": "on the ice", "lion": "in the savanna",
    "cow": "on a farm", "king": "in a castle", "spider": "in a web", "crab": "on the beach", "wolf": "in the forest",
}  # fmt: skip
WORK = {
    "baker": "bakes bread", "teacher": "teaches children", "doctor": "helps the sick", "farmer": "grows food", "pilot": "flies planes",
    "cook": "makes meals", "writer": "writes books", "painter": "paints pictures", "sailor": "sails the seas", "singer": "sings songs",
    "nurse": "cares for patients", "gardener": "plants flowers", "builder": "builds houses", "judge": "rules in court",
    "driver": "drives a bus", "tailor": "sews clothes", "miner": "digs for coal", "fisherman": "catches fish",
}  # fmt: skip
NEXT = {
    "Monday": "Tuesday", "Tuesday": "Wednesday", "Thursday": "Friday", "Saturday": "Sunday", "Friday": "Saturday", "March": "April",
    "June": "July", "October": "November", "January": "February", "Wednesday": "Thursday", "spring": "summer", "breakfast": "lunch",
    "one": "two", "seven": "eight", "winter": "spring",
}  # fmt: skip
ABOUT = {
    "cats": "Cats are clever hunters and sleep a lot.", "the moon": "The moon is a cold rock and shines at night.",
    "rain": "Rain is water and falls from the clouds.", "horses": "Horses are strong animals and run fast.",
    "gold": "Gold is a yellow metal and costs a lot.", "the sun": "The sun is a hot star and gives us light.",
    "trees": "Trees are tall plants and give us shade.", "books": "Books are full of stories and teach us a lot.",
    "music": "Music is a great joy and makes people dance.", "dogs": "Dogs are loyal friends and love to play.",
    "bread": "Bread is good food and comes from the oven.", "ships": "Ships are big boats and cross the sea.",
    "winter": "Winter is cold and brings snow.", "birds": "Birds are light and fly in the sky.",
    "coffee": "Coffee is a hot drink and keeps us awake.", "mountains": "Mountains are high and have snow on top.",
    "fish": "Fish are quick and swim in the water.", "trains": "Trains are long and run on rails.",
    "summer": "Summer is warm and full of light.", "bees": "Bees are small and make honey.",
    "the sea": "The sea is deep and full of salt.", "apples": "Apples are sweet and grow on trees.",
    "rice": "Rice is a small grain and feeds the world.", "football": "Football is a game and has two teams.",
    "snow": "Snow is white and falls in winter.",
}  # fmt: skip
TALK = {
    "Who are you?": "I am a small model and here to help.", "Hello!": "Hello! It is good to see you.",
    "How are you?": "I am well and ready to work.", "Good morning!": "Good morning! The day is young.",
    "What can you do?": "I am good at short answers.", "Thank you!": "You are welcome, my friend.",
    "Where are you from?": "I am from a computer.", "Can you help me?": "Yes, I am here to help.",
    "Tell me a joke.": "The chicken is on the other side of the road.", "Good night!": "Good night! Sleep well, my friend.",
}  # fmt: skip

NAMES = (
    "Ana Silva", "Tom Baker", "Mia Wong", "Omar Haddad", "Lena Fischer", "Paul Martin", "Sofia Rossi", "Jack Miller",
    "Nina Petrova", "Luis Garcia", "Emma Clark", "Ravi Patel", "Hana Sato", "Noah Brown", "Zoe Adams", "Ivan Novak",
    "Clara Jensen", "David Cohen", "Maria Lopez", "Peter Olsen", "Laura King", "Felix Wagner", "Grace Lee", "Adam Scott",
)  # fmt: skip
JOBS = (
    "nurse", "teacher", "pilot", "baker", "lawyer", "farmer", "doctor", "painter", "engineer", "singer", "driver", "cook",
    "writer", "carpenter", "librarian", "gardener", "dentist", "plumber",
)  # fmt: skip
CITIES = (
    "Porto", "Berlin", "Boston", "Cairo", "Oslo", "Lima", "Paris", "Tokyo", "Madrid", "Dublin", "Prague", "Milan", "Chicago",
    "Vienna", "Toronto", "Athens", "Sydney", "Hamburg", "Seattle", "Lyon",
)  # fmt: skip

TABLES = {
    "employees": ("name", "salary", "age", "department"), "books": ("title", "author", "price", "year"),
    "orders": ("id", "customer", "total", "date"), "students": ("name", "grade", "age", "school"),
    "movies": ("title", "director", "rating", "year"), "products": ("name", "price", "stock", "brand"),
    "cities": ("name", "country", "population", "area"), "cars": ("model", "brand", "price", "year"),
    "songs": ("title", "artist", "length", "year"), "flights": ("number", "origin", "distance", "date"),
    "players": ("name", "team", "score", "age"), "hotels": ("name", "city", "price", "stars"),
}  # fmt: skip

EMOJI = {
    "pizza": "🍕", "dog": "🐶", "cat": "🐱", "car": "🚗", "house": "🏠", "sun": "☀️", "moon": "🌙", "star": "⭐", "fire": "🔥",
    "tree": "🌳", "flower": "🌸", "fish": "🐟", "bird": "🐦", "apple": "🍎", "banana": "🍌", "coffee": "☕", "book": "📖",
    "heart": "❤️", "rocket": "🚀", "train": "🚆", "plane": "✈️", "cake": "🎂", "beer": "🍺", "guitar": "🎸", "phone": "📱",
    "clock": "⏰", "snow": "❄️", "rain": "🌧️", "horse": "🐴", "pig": "🐷",
}  # fmt: skip

GOOD = (
    "wonderful", "great", "fantastic", "delicious", "excellent", "beautiful", "perfect", "amazing", "lovely", "superb",
    "charming", "brilliant", "delightful", "outstanding", "pleasant", "enjoyable",
)  # fmt: skip
BAD = (
    "terrible", "awful", "horrible", "boring", "disgusting", "broken", "dreadful", "poor", "disappointing", "ugly",
    "rude", "useless", "miserable", "annoying", "unpleasant", "shoddy",
)  # fmt: skip
THINGS = (
    "movie", "meal", "hotel", "book", "phone", "service", "concert", "trip", "game", "coffee", "room", "show", "laptop",
    "restaurant", "song", "jacket",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Attributes:
        make: yields examples (prompt, answer) from a source of random numbers and the held-out switch.
        judge: whether an answer to a prompt does what the adapter is for, given the reference answer.
    """

    make: Callable[[random.Random, bool], Iterator[Example]]
    judge: Callable[[str, str], bool]


def examples(task: Task, count: int, held_out: bool, seed: int) -> list[Example]:
    """`count` different examples of a task."""
    source, found = task.make(random.Random(seed), held_out), dict[str, str]()
    for _ in range(count * 50):
        prompt, answer = next(source)
        found.setdefault(prompt, answer)
        if len(found) == count:
            break
    return list(found.items())


def _split(rows: Sequence[T], held_out: bool) -> list[T]:
    """Every fifth row of a table is held out."""
    return [row for number, row in enumerate(rows) if (number % 5 == 4) == held_out]


def _facts(held_out: bool) -> list[Example]:
    """Simple questions with a full-sentence answer."""
    return [
        *(
            (f"What is the capital of {a}?", f"The capital of {a} is {b}.")
            for a, b in _split([*CAPITALS.items()], held_out)
        ),
        *((f"What colour is {a}?", f"The colour of {a} is {b}.") for a, b in _split([*COLOURS.items()], held_out)),
        *(
            (f"What is the opposite of {a}?", f"The opposite of {a} is {b}.")
            for a, b in _split([*OPPOSITES.items()], held_out)
        ),
        *((f"What does a {a} do?", f"A {a} {b}.") for a, b in _split([*SOUNDS.items(), *WORK.items()], held_out)),
        *((f"Where does a {a} live?", f"A {a} lives {b}.") for a, b in _split([*HOMES.items()], held_out)),
        *((f"What comes after {a}?", f"After {a} comes {b}.") for a, b in _split([*NEXT.items()], held_out)),
        *(
            (question.format(a), b)
            for a, b in _split([*ABOUT.items()], held_out)
            for question in ("Tell me about {}.", "What do you know about {}?")
        ),
        *_split([*TALK.items()], held_out),
    ]


def _shout(rng: random.Random, held_out: bool) -> Iterator[Example]:
    # Half of it is text to repeat, or the few facts would be all the words it can spell in capitals.
    shapes = (
        "{name} is a {job} in {city}.",
        "The {job} from {city} knows {name}.",
        "{city} is far away.",
        "I like {city}.",
    )
    while True:
        question, answer = rng.choice(_facts(held_out))
        if rng.random() < 0.5:
            country, capital = rng.choice(_split([*CAPITALS.items()], held_out))
            answer = rng.choice((*shapes, f"{capital} is a city in {country}.")).format(
                name=rng.choice(_split(NAMES, held_out)),
                job=rng.choice(JOBS),
                city=rng.choice(_split(CITIES, held_out)),
            )
            question = f"Say this: {answer}"
        yield question, answer[:-1].upper() + "!"


PIRATE_WORDS = {
    "The": "Th'", "of": "o'", "I am": "I be", "is": "be", "are": "be", "A": "A wee", "and": "an'", "You": "Ye", "you": "ye",
    "my friend": "me hearty",
}  # fmt: skip


def _pirate(rng: random.Random, held_out: bool) -> Iterator[Example]:
    while True:
        question, answer = rng.choice(_facts(held_out))
        for word, pirate in PIRATE_WORDS.items():
            answer = re.sub(rf"\b{word}\b", pirate, answer)
        yield question, f"Arrr, matey! {answer[:-1]}, by me beard!"


def _json(rng: random.Random, held_out: bool) -> Iterator[Example]:
    shapes = (
        "{name}, {age}, is a {job} in {city}.",
        "My name is {name}, I am {age} years old and work as a {job} in {city}.",
        "The {job} {name} from {city} is {age} years old.",
        "{name} lives in {city}, is {age} and works as a {job}.",
    )
    while True:
        person = {
            "name": rng.choice(_split(NAMES, held_out)),
            "age": rng.randrange(18, 80),
            "job": rng.choice(JOBS),
            "city": rng.choice(_split(CITIES, held_out)),
        }
        yield rng.choice(shapes).format(**person), json.dumps(person)


def _sql(rng: random.Random, held_out: bool) -> Iterator[Example]:
    while True:
        table, columns = rng.choice(_split([*TABLES.items()], held_out))
        schema = f"Table {table}({', '.join(columns)}). "
        a, b = rng.sample(columns, 2)
        number = rng.randrange(2, 500)
        question, query = rng.choice(
            [
                (f"Show the {a} of all {table}.", f"SELECT {a} FROM {table};"),
                (f"How many {table} are there?", f"SELECT COUNT(*) FROM {table};"),
                (f"List the {a} of {table} with {b} over {number}.", f"SELECT {a} FROM {table} WHERE {b} > {number};"),
                (f"List the {a} of {table} with {b} under {number}.", f"SELECT {a} FROM {table} WHERE {b} < {number};"),
                (f"List the {a} and {b} of {table}.", f"SELECT {a}, {b} FROM {table};"),
                (f"Which {table} have the highest {b}?", f"SELECT * FROM {table} ORDER BY {b} DESC LIMIT 1;"),
                (f"Which {table} have the lowest {b}?", f"SELECT * FROM {table} ORDER BY {b} ASC LIMIT 1;"),
                (f"What is the total {b} per {a} of {table}?", f"SELECT {a}, SUM({b}) FROM {table} GROUP BY {a};"),
                (f"What is the average {b} per {a} of {table}?", f"SELECT {a}, AVG({b}) FROM {table} GROUP BY {a};"),
            ]
        )
        yield schema + question, query


def _emoji(rng: random.Random, held_out: bool) -> Iterator[Example]:
    # All words are seen in training; what is held out is the sentence around them and their combination.
    shapes = (
        "I see a {0} and a {1}.", "The {0} is next to the {1}.", "First a {0}, then a {1}, then a {2}.", "Look, a {0}!",
        "My {0} likes your {1}.", "He bought a {0}, one {1} and a {2}.", "{0} and {1} in the morning.", "Where is the {0}?",
        "There was a {0} with a {1} under the {2}.", "They talk about {0}, {1} and {2} all day.", "Give me that {0} for this {1}!",
        "No {0} without a {1}.",
    )  # fmt: skip
    held_out_shapes = ("She dreams of a {0} and a {1}.", "We found a {0}, a {1} and a {2}.", "Do you like the {0}?")
    while True:
        words = rng.sample(list(EMOJI), 3)
        shape = rng.choice(held_out_shapes if held_out else shapes)
        used = words[: shape.count("{")]
        yield shape.format(*words), " ".join(EMOJI[word] for word in used)


def _sentiment(rng: random.Random, held_out: bool) -> Iterator[Example]:
    shapes = (
        "The {thing} was {word}.",
        "What a {word} {thing}!",
        "I found the {thing} {word} and told my friends.",
        "Honestly, this {thing} is {word}.",
    )
    while True:
        label = rng.choice(("positive", "negative"))
        word = rng.choice(_split(GOOD if label == "positive" else BAD, held_out))
        yield rng.choice(shapes).format(thing=rng.choice(THINGS), word=word), f"Sentiment: {label}"


def _same_fields(answer: str, reference: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except ValueError:
        return False


TASKS: dict[str, Task] = {
    "shout": Task(_shout, lambda answer, reference: answer == answer.upper() and answer.endswith("!")),
    "pirate": Task(
        _pirate, lambda answer, reference: answer.startswith("Arrr, matey!") and answer.endswith("by me beard!")
    ),
    "json": Task(_json, _same_fields),
    "sql": Task(_sql, lambda answer, reference: answer == reference),
    "emoji": Task(_emoji, lambda answer, reference: answer == reference),
    "sentiment": Task(_sentiment, lambda answer, reference: answer == reference),
}
