"""The words of `bundled:word-problems`. Train and test share no sentence, no name and no thing (tests/train holds
them to it).

{n} and {m} are names, {o} is a thing in the plural, {a}, {b} and {c} are the numbers in the order of the calculation.
"""

from __future__ import annotations

NAMES = {
    "train": (
        *("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Jack", "Emma", "Paul", "Sara", "Max", "Kate"),
        *("Leo", "Ella", "Noah", "Ruth", "Dan", "Lily", "Adam", "Jane", "Carl", "Rosa", "Ivan", "Nina"),
    ),
    "test": ("Omar", "Grace", "Hugo", "Clara", "Felix", "Maria", "Peter", "Alice", "Simon", "Julia", "Oscar", "Helen"),
}

THINGS = {
    "train": (
        *("apples", "books", "pencils", "stamps", "marbles", "cards", "coins", "eggs", "flowers", "cookies", "shells"),
        *(
            "balls",
            "stickers",
            "oranges",
            "candles",
            "plates",
            "tickets",
            "toys",
            "buttons",
            "nuts",
            "rings",
            "bottles",
        ),
    ),
    "test": (
        "pears",
        "magazines",
        "crayons",
        "badges",
        "beads",
        "photos",
        "lemons",
        "muffins",
        "roses",
        "stones",
        "cups",
        "keys",
    ),
}

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "add": {
        "train": (
            "{n} has {a} {o} and buys {b} more. How many {o} does {n} have now?",
            "{n} has {a} {o}. {m} gives {n} {b} {o}. How many {o} does {n} have?",
            "There are {a} {o} in a box. {n} puts {b} more in it. How many are in the box?",
            "{n} found {a} {o} on Monday and {b} on Tuesday. How many in total?",
            "{n} has {a} {o} and {m} has {b}. How many do they have together?",
            "A shop sold {a} {o} in the morning and {b} in the evening. How many did it sell?",
            "{n} made {a} {o}, then another {b}. How many did {n} make?",
            "{n} has {a} {o}. {m} has {b} more than {n}. How many does {m} have?",
        ),
        "test": (
            "On a table lie {a} {o}; {n} adds {b} to them. Count the {o} on the table.",
            "{n} picked {a} {o}, and {m} picked {b}. What is the sum of their {o}?",
            "After {n} collected {a} {o}, {m} brought {b} extra. What number of {o} is that altogether?",
        ),
    },
    "subtract": {
        "train": (
            "{n} has {a} {o} and gives {b} to {m}. How many {o} does {n} have now?",
            "{n} had {a} {o} and lost {b}. How many are left?",
            "There are {a} {o} in a box. {n} takes {b} out. How many are in the box?",
            "A shop had {a} {o} and sold {b}. How many does it have left?",
            "{n} bought {a} {o} and used {b}. How many did {n} still have?",
            "{n} has {a} {o}. {m} has {b} fewer than {n}. How many does {m} have?",
            "{n} has {a} {o} and {m} has {b}. How many more does {n} have?",
            "Of {a} {o}, {b} broke. How many are whole?",
        ),
        "test": (
            "On a table lie {a} {o}; {n} removes {b} of them. Count the {o} that remain.",
            "{n} owned {a} {o} until {m} took away {b}. What number remains?",
            "Out of the {a} {o} {n} picked, {b} were thrown away. Tell how many {n} kept.",
        ),
    },
    "multiply": {
        "train": (
            "{n} has {a} boxes with {b} {o} each. How many {o} does {n} have?",
            "There are {a} bags. Each bag has {b} {o}. How many {o} are there?",
            "{n} buys {a} packs of {b} {o}. How many {o} is that?",
            "{a} friends have {b} {o} each. How many do they have together?",
            "{n} makes {b} {o} a day. How many does {n} make in {a} days?",
            "A shelf has {a} rows of {b} {o}. How many {o} are on it?",
        ),
        "test": (
            "In each of {a} baskets {n} put {b} {o}. What is the number of {o} in all baskets?",
            "Every one of {a} children got {b} {o}. Count all their {o}.",
            "{n} filled {a} jars, placing {b} {o} in every jar. What number of {o} did that take?",
        ),
    },
    "add_add": {
        "train": (
            "{n} has {a} {o}, buys {b} and finds {c} more. How many {o} does {n} have now?",
            "{n} has {a} {o}. {m} gives {n} {b}, then {c} more. How many {o} does {n} have?",
            "A shop sold {a} {o} on Monday, {b} on Tuesday and {c} on Friday. How many in total?",
            "There are {a} {o} in a box. {n} puts in {b} and {m} puts in {c}. How many are in the box?",
            "{n} made {a} {o}, {m} made {b} and a friend made {c}. How many do they have together?",
            "{n} read {a} pages, then {b}, then another {c}. How many pages did {n} read?",
        ),
        "test": (
            "On a table lie {a} {o}; {n} adds {b}, later {m} adds {c}. Count the {o} on the table.",
            "{n} picked {a} red {o}, {b} white ones and {c} black ones. What is the sum?",
            "After {n} collected {a} {o}, {m} brought {b} and then {c} extra. What number is that altogether?",
        ),
    },
    "add_subtract": {
        "train": (
            "{n} has {a} {o}, buys {b} more and gives {c} to {m}. How many {o} does {n} have now?",
            "There are {a} {o} in a box. {n} puts {b} in and takes {c} out. How many are in the box?",
            "{n} had {a} {o}, found {b} and lost {c}. How many are left?",
            "A shop had {a} {o}, got {b} more and sold {c}. How many does it have left?",
            "{n} made {a} {o}, then another {b}, and used {c}. How many did {n} still have?",
            "{m} gave {n} {a} {o}, then {b} more. {n} sold {c}. How many {o} does {n} have?",
        ),
        "test": (
            "On a table lie {a} {o}; {n} adds {b}, later {m} removes {c}. Count the {o} that remain.",
            "{n} picked {a} {o}, picked {b} again, but threw away {c}. What number remains?",
            "After {n} collected {a} {o}, {m} brought {b} extra and took away {c}. Tell how many {n} kept.",
        ),
    },
    "subtract_add": {
        "train": (
            "{n} has {a} {o}, gives {b} to {m} and buys {c} more. How many {o} does {n} have now?",
            "There are {a} {o} in a box. {n} takes {b} out and puts {c} in. How many are in the box?",
            "{n} had {a} {o}, lost {b} and found {c}. How many does {n} have now?",
            "A shop had {a} {o}, sold {b} and got {c} more. How many does it have?",
            "{n} made {a} {o}, used {b}, then made another {c}. How many did {n} have?",
            "Of {a} {o}, {b} broke. {n} buys {c} new ones. How many are whole?",
        ),
        "test": (
            "On a table lie {a} {o}; {n} removes {b}, later {m} adds {c}. Count the {o} on the table.",
            "{n} picked {a} {o}, threw away {b}, but picked {c} again. What number remains?",
            "{n} owned {a} {o} until {m} took away {b} and brought {c} extra. Tell how many {n} kept.",
        ),
    },
    "multiply_add": {
        "train": (
            "{n} has {a} boxes with {b} {o} each and {c} more {o}. How many {o} does {n} have?",
            "There are {a} bags. Each bag has {b} {o}. {n} adds {c} more. How many {o} are there?",
            "{n} buys {a} packs of {b} {o} and finds {c}. How many {o} is that?",
            "{n} makes {b} {o} a day for {a} days, then {c} more. How many did {n} make?",
            "{a} friends have {b} {o} each and {n} has {c}. How many do they have together?",
        ),
        "test": (
            "In each of {a} baskets {n} put {b} {o}; {c} others lie outside. Count all the {o}.",
            "Every one of {a} children got {b} {o}, and {n} got {c}. What is the sum of their {o}?",
            "{n} filled {a} jars, placing {b} {o} in every jar, and kept {c} extra. What number is that altogether?",
        ),
    },
    "multiply_subtract": {
        "train": (
            "{n} has {a} boxes with {b} {o} each and gives {c} {o} to {m}. How many {o} does {n} have now?",
            "There are {a} bags. Each bag has {b} {o}. {n} takes {c} out. How many {o} are left?",
            "{n} buys {a} packs of {b} {o} and loses {c}. How many are left?",
            "{n} makes {b} {o} a day for {a} days and sells {c}. How many does {n} have left?",
            "A shelf has {a} rows of {b} {o}. {n} used {c}. How many {o} are still on it?",
        ),
        "test": (
            "In each of {a} baskets {n} put {b} {o}; {m} removes {c}. Count the {o} that remain.",
            "Every one of {a} children got {b} {o}; together they threw away {c}. What number remains?",
            "{n} filled {a} jars, placing {b} {o} in every jar, but {m} took away {c}. Tell how many {n} kept.",
        ),
    },
}
