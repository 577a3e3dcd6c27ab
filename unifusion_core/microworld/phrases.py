"""What people say instead of the table's words: knowledge, synonyms and sentence patterns.

Facts are shared by all splits (a model cannot know what it was never told); sentence patterns are split, and those
under `held_out` are never trained on; but each of their words is, since no model knows a word it never met.
"""

from __future__ import annotations

SHAPE_FACTS = {
    "circle": ("shape without corners", "shape of a wheel", "shape of the full moon"),
    "square": ("shape with four equal sides", "shape of a chessboard", "shape with four corners"),
    "triangle": ("shape with three sides", "shape of a pyramid", "shape with three corners"),
    "star": ("shape with five points", "shape of a sheriff badge", "shape that shines at night"),
    "cross": ("shape of a plus sign", "shape on a hospital", "shape of a crossroads"),
    "heart": ("shape that stands for love", "shape of a valentine", "shape that beats in a chest"),
}
COLOR_FACTS = {
    "red": ("color of blood", "color of a ripe tomato"),
    "green": ("color of grass", "color of yellow mixed with blue"),
    "blue": ("color of the deep sea", "color of the sky"),
    "yellow": ("color of a lemon", "color of the sun"),
    "purple": ("color of grapes", "color of red mixed with blue"),
    "orange": ("color of a carrot", "color of red mixed with yellow"),
    "pink": ("color of a flamingo", "color of red mixed with white"),
    "cyan": ("color of ice", "color of green mixed with blue"),
}
BACKGROUND_FACTS = {
    "white": ("color of snow", "color of milk"),
    "black": ("color of coal", "color of night"),
    "gray": ("color of ash", "color of an elephant"),
    "beige": ("color of sand", "color of a biscuit"),
}
COUNT_FACTS = {
    1: ("the earth has moons",),
    2: ("a bicycle has wheels", "a bird has wings"),
    3: ("a traffic light has colors", "a triangle has sides"),
    4: ("a car has wheels", "a square has sides"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "heart": "hearts",
}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
    "diagonal": ("diagonally opposite", "in the corner opposite to"),
}

# {things}: a list of things; {on}: empty or "on a gray background".
SCENE_PATTERNS = {
    "train": (
        "{things} {on}",
        "draw {things} {on}",
        "please paint {things} {on}",
        "a picture of {things} {on}",
        "make an image with {things} {on}",
        "there is {things} {on}",
        "i want {things} {on}",
        "show {things} {on}",
    ),
    "held_out": (
        "please make a picture with {things} {on}",
        "i want an image of {things} {on}",
        "paint {things} {on} please",
        "show a picture of {things} {on} please",
    ),
}
CAPTION_PATTERNS = {
    "train": ("describe the image", "what is in the picture", "describe this picture in detail", "show this again"),
    "held_out": ("what is in this image", "describe the picture"),
}
EDIT_PATTERNS = {
    "recolor": {
        "train": ("make {ref} {new}", "paint {ref} {new}", "change the color of {ref} to {new}", "turn {ref} {new}"),
        "held_out": ("please make {ref} {new}", "i want {ref} in {new}"),
    },
    "remove": {
        "train": ("remove {ref}", "delete {ref}", "take {ref} away", "the image without {ref}"),
        "held_out": ("please delete {ref}", "i want the picture without {ref}"),
    },
    "add": {
        "train": ("add {new} at {position}", "put {new} at {position}", "draw {new} at {position}"),
        "held_out": ("please add {new} at {position}", "i want {new} at {position}"),
    },
    "move": {
        "train": ("move {ref} to {position}", "put {ref} at {position}", "bring {ref} to {position}"),
        "held_out": ("please move {ref} to {position}", "i want {ref} at {position}"),
    },
    "resize": {
        "train": ("make {ref} {new}", "change the size of {ref} to {new}", "turn {ref} {new}"),
        "held_out": ("please make {ref} {new}", "i want {ref} {new}"),
    },
    "reshape": {
        "train": ("turn {ref} into {new}", "change {ref} to {new}", "replace {ref} with {new}", "make {ref} {new}"),
        "held_out": ("please turn {ref} into {new}", "please replace {ref} with {new}"),
    },
    "background": {
        "train": ("make the background {new}", "change the background to {new}", "paint the background {new}"),
        "held_out": ("please make the background {new}", "i want the background in {new}"),
    },
}
COMPOSE_PATTERNS = {
    "train": (
        "combine {one} from image one with {two} from image two",
        "put {one} from image one beside {two} from image two",
        "draw {one} of image one and {two} of image two",
    ),
    "held_out": (
        "show {one} from image one with {two} from image two",
        "make a picture with {one} of image one and {two} of image two",
    ),
}
EXTRA_WORDS = "a an the and with on in at of to from background canvas corner one two three four shapes shape color "
EXTRA_WORDS += (
    "plus minus as many same thing please instead me this image picture object objects both no is are it scene"
)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
