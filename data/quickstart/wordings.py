"""The language of the quickstart: what people say, the command it means, and what training never sees.

A wording is a request with named slots; its answer has the same slots, always in the same order, after `command`.
A slot's value is copied verbatim from the request into the answer: nothing is computed, rounded or translated.
Held-out wordings and values appear in eval.jsonl only. The held-out values are everyday words, most of them whole
tokens to the quickstart's model: what is asked is whether it copies a value it was not trained on, not how it spells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Value = str | int


@dataclass(frozen=True)
class Values:
    """The values of one slot: those training may use, and those only the evaluation uses."""

    trained: tuple[Value, ...]
    held_out: tuple[Value, ...]


@dataclass(frozen=True)
class Intent:
    """One command of a domain: its slots in answer order, its trained wordings, its held-out wordings."""

    domain: str
    command: str
    slots: tuple[str, ...]
    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    def answer(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The command as a mapping whose key order is the one of the written JSON."""
        return {"command": self.command} | {slot: values[slot] for slot in self.slots}


SLOTS: dict[str, Values] = {
    "room": Values(
        (
            "kitchen",
            "bedroom",
            "living room",
            "bathroom",
            "hallway",
            "garage",
            "dining room",
            "basement",
            "laundry room",
            "guest room",
            "library",
            "sunroom",
        ),
        ("office", "classroom", "ballroom", "studio"),
    ),
    "degrees": Values((16, 17, 18, 19, 21, 22, 24, 25, 62, 64, 66, 67, 70, 71, 73, 75), (20, 23, 65, 68)),
    "minutes": Values((2, 3, 5, 6, 7, 10, 12, 15, 20, 25, 30, 40, 45, 60, 90), (4, 9, 35, 50)),
    "label": Values(
        (
            "pasta",
            "eggs",
            "laundry",
            "pizza",
            "rice",
            "tea",
            "bread",
            "homework",
            "workout",
            "potatoes",
            "cookies",
            "nap",
        ),
        ("soup", "dishes", "steak", "reading"),
    ),
    "genre": Values(
        (
            "jazz",
            "rock",
            "blues",
            "folk",
            "reggae",
            "disco",
            "soul",
            "opera",
            "country",
            "techno",
            "swing",
            "hip hop",
        ),
        ("salsa", "punk", "metal", "pop"),
    ),
    "item": Values(
        (
            "milk",
            "eggs",
            "bread",
            "olive oil",
            "coffee",
            "bananas",
            "dog food",
            "rice",
            "tomatoes",
            "butter",
            "toothpaste",
            "apple juice",
            "onions",
            "paper towels",
            "honey",
            "yogurt",
        ),
        ("sugar", "apples", "salt", "water"),
    ),
    "name": Values(
        ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Maria", "Tom"),
        ("Peter", "Paul", "Jack", "Robert"),
    ),
    "text": Values(
        (
            "I am running late",
            "dinner is ready",
            "the train is delayed",
            "I will be home soon",
            "the meeting is over",
            "I forgot my keys",
            "we need more milk",
            "the package is here",
            "I am at the station",
            "the car is fixed",
            "we won the game",
            "lunch is on me",
        ),
        ("the baby is asleep", "I lost my phone", "the shop is closed", "I am on my way"),
    ),
}

INTENTS: tuple[Intent, ...] = (
    Intent(
        "lights",
        "lights_on",
        ("room",),
        (
            "Turn on the {room} lights",
            "Turn the lights on in the {room}",
            "Switch on the lights in the {room}",
            "Lights on in the {room}, please",
            "It is too dark in the {room}, turn on the light",
            "Please switch the {room} light on",
        ),
        ("Could you put the lights on in the {room}?",),
    ),
    Intent(
        "lights",
        "lights_off",
        ("room",),
        (
            "Turn off the {room} lights",
            "Turn the lights off in the {room}",
            "Switch off the lights in the {room}",
            "Lights off in the {room}, please",
            "Nobody is in the {room}, turn off the light",
            "Please switch the {room} light off",
        ),
        ("Could you put the lights off in the {room}?",),
    ),
    Intent(
        "thermostat",
        "set_temperature",
        ("room", "degrees"),
        (
            "Set the {room} to {degrees} degrees",
            "Set the thermostat in the {room} to {degrees}",
            "Make it {degrees} degrees in the {room}",
            "Heat the {room} to {degrees} degrees",
            "Change the {room} temperature to {degrees}",
            "I want the {room} at {degrees} degrees",
            "Please keep the {room} at {degrees} degrees",
            "The {room} should be {degrees} degrees",
            "Bring the {room} up to {degrees} degrees",
            "Can you set the temperature to {degrees} in the {room}?",
        ),
        ("Please warm the {room} to {degrees} degrees", "Adjust the {room} thermostat to {degrees}"),
    ),
    Intent(
        "timer",
        "set_timer",
        ("minutes", "label"),
        (
            "Set a timer of {minutes} minutes for the {label}",
            "Start a {minutes} minute timer for the {label}",
            "Set the {label} timer to {minutes} minutes",
            "Time the {label} for {minutes} minutes",
            "I need a timer for the {label}, {minutes} minutes",
            "Start a timer for the {label}: {minutes} minutes",
            "Give me {minutes} minutes for the {label}",
            "Count down {minutes} minutes for the {label}",
            "The {label} needs a timer of {minutes} minutes",
            "Please start the {label} timer, {minutes} minutes",
        ),
        ("Please set a {minutes} minute timer for the {label}", "Can you time {minutes} minutes for the {label}?"),
    ),
    Intent(
        "music",
        "play_music",
        ("genre", "room"),
        (
            "Play {genre} in the {room}",
            "Play some {genre} music in the {room}",
            "Put on some {genre} in the {room}",
            "I want to hear {genre} in the {room}",
            "Start {genre} music in the {room}",
            "Can you play {genre} in the {room}?",
            "Let me hear some {genre} in the {room}",
            "In the {room}, play some {genre}",
            "Please put {genre} music on in the {room}",
            "The {room} speaker should play {genre}",
        ),
        ("Could we have some {genre} music in the {room}?", "Please play {genre} on the {room} speaker"),
    ),
    Intent(
        "shopping",
        "add_item",
        ("item",),
        (
            "Add {item} to the shopping list",
            "Put {item} on my shopping list",
            "We need {item}, add it to the list",
            "I have to buy {item}",
            "Remind me to buy {item}",
            "We are out of {item}",
            "Buy some {item}",
            "Shopping list: {item}",
            "Please put {item} on the list",
            "I want {item} on my shopping list",
        ),
        ("Please add {item} to my list", "We should buy {item}"),
    ),
    Intent(
        "messages",
        "send_message",
        ("name", "text"),
        (
            "Tell {name} that {text}",
            "Send a message to {name}: {text}",
            "Text {name}: {text}",
            "Message {name} that {text}",
            "Let {name} know that {text}",
            "Write to {name}: {text}",
            "Please tell {name}: {text}",
            "Send {name} a text saying {text}",
            "I want {name} to know that {text}",
            "Can you write {name} that {text}?",
        ),
        ("Please text {name} that {text}", "Send {name} a message: {text}"),
    ),
)
