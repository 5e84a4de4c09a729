"""Write linearpatch/tasks: pairs of sentences and short stories, made from the words and frames below.

python tools/make_tasks.py [FOLDER]        the same files, bit for bit, on every machine

A frame gives two items, in which what is right and what is wrong change places: whoever looks at the words and not at what
stands around them is right in exactly half of the items. The words are frequent ones, so that a very small model knows them.
Six more phenomena were tried and left out, because the playground model is at chance: agreement across "of the house",
himself and herself, "shook his head", "No man has ever", yesterday and tomorrow, and (for the second model of the tests)
both ... and. The things of `thing` are those that the two models notice more than others.
"""

import json
import random
import sys
from pathlib import Path

SEED, FRAMES, VERSION = (
    7,
    100,
    1.0,
)  # 100 frames make 200 items; a change of the items needs a new version

men = "man boy king father brother son husband uncle prince priest".split()
women = "woman girl queen mother sister daughter wife aunt lady princess".split()
people = dict(
    man="men",
    woman="women",
    boy="boys",
    girl="girls",
    king="kings",
    friend="friends",
    brother="brothers",
    sister="sisters",
    child="children",
    soldier="soldiers",
    doctor="doctors",
    student="students",
    officer="officers",
)
things = dict(
    house="houses",
    door="doors",
    book="books",
    letter="letters",
    tree="trees",
    ship="ships",
    horse="horses",
    town="towns",
    song="songs",
    picture="pictures",
    room="rooms",
    road="roads",
    church="churches",
    word="words",
)
sizes = ["", "old ", "young ", "good ", "little ", "poor "]
kinds = ["", "old ", "new ", "little ", "great ", "good "]
places = [
    "in the house",
    "in the city",
    "on the road",
    "at the door",
    "near the river",
    "in the church",
    "in the room",
    "by the sea",
    "in the street",
    "in the garden",
    "behind the house",
    "in the town",
]
verbs = {
    "go went gone": [
        "to the city",
        "into the house",
        "down to the river",
        "home with his father",
        "to the church",
    ],
    "see saw seen": [
        "the king",
        "a light in the house",
        "the men on the road",
        "her face",
        "the ship",
    ],
    "take took taken": [
        "the book",
        "the child by the hand",
        "the letter to the king",
        "the horse",
        "the money",
    ],
    "give gave given": [
        "the letter to his brother",
        "her the book",
        "him some money",
        "the child a name",
        "the order",
    ],
    "write wrote written": [
        "a letter",
        "a book",
        "to his friend",
        "the story of his life",
        "to the king",
    ],
    "know knew known": ["the truth", "the man", "her brother", "his name", "the way"],
    "speak spoke spoken": [
        "to the king",
        "of his mother",
        "to her",
        "in a low voice",
        "with the doctor",
    ],
    "fall fell fallen": [
        "into the water",
        "to the ground",
        "from the tree",
        "in love with her",
        "on the road",
    ],
    "break broke broken": ["the door", "his word", "the law", "her heart", "his arm"],
    "begin began begun": ["the work", "to speak", "to read the book", "his story"],
    "do did done": ["the work", "his best", "what he could", "no harm", "it for the king"],
    "eat ate eaten": ["the bread", "nothing", "with the children", "the fish", "at the table"],
    "forget forgot forgotten": [
        "his name",
        "the letter",
        "the old man",
        "her words",
        "the way home",
    ],
}


def noun(rng, pool=people):
    "A noun in the singular and in the plural, perhaps with an adjective."
    adjective, one = rng.choice(sizes if pool is people else kinds), rng.choice(list(pool))
    return adjective + one, adjective + pool[one]


def act(rng):
    "A verb in its three forms, and how the sentence goes on."
    forms = rng.choice(list(verbs))
    return *forms.split(), rng.choice(verbs[forms])


def turn(frame, a, b):
    "The frame with `a` (right) and with `b` (wrong)."
    return frame.format(a), frame.format(b)


def agreement(rng):
    "The boy was / the boys were."
    one, many = noun(rng)
    singular, plural = rng.choice([("is", "are"), ("was", "were"), ("has", "have")])
    if singular == "has":
        rest = rng.choice(
            [
                "come home",
                "gone to the city",
                "seen the king",
                "been in the house",
                "found the book",
            ]
        )
    else:
        rest = rng.choice(
            [
                *places,
                "very happy",
                "very poor",
                "not at home",
                "still alive",
                "not afraid",
                "already dead",
            ]
        )
    return turn(f"The {one} {{}} {rest}.", singular, plural), turn(
        f"The {many} {{}} {rest}.", plural, singular
    )


def determiner(rng):
    "This book / these books."
    one, many = noun(rng, rng.choice([people, things]))
    this, these = rng.choice([("this", "these"), ("that", "those")])
    start = rng.choice(
        [
            "He saw",
            "She left",
            "We found",
            "They looked at",
            "I thought of",
            "He spoke of",
            "She was afraid of",
            "They came to",
        ]
    )
    end = rng.choice(
        ["", " again", " in the morning", " at last", " for the first time", " one day"]
    )
    return turn(f"{start} {{}} {one}{end}.", this, these), turn(
        f"{start} {{}} {many}{end}.", these, this
    )


def numeral(rng):
    "Two books / one book."
    one, many = noun(rng, rng.choice([people, things]))
    start = rng.choice(
        ["He saw", "She had", "We found", "They knew", "I saw", "He spoke of", "She wrote about"]
    )
    end = rng.choice(["", " " + rng.choice(places)])
    several = rng.choice(["two", "three", "four", "five", "six", "several", "many"])
    single = rng.choice(["one", "a single", "every", "each"])
    return turn(f"{start} {several} {{}}{end}.", many, one), turn(
        f"{start} {single} {{}}{end}.", one, many
    )


def article(rng):
    "A house / an hour."
    vowel = rng.choice(
        [
            "old man",
            "old house",
            "hour",
            "island",
            "army",
            "idea",
            "officer",
            "evening",
            "open door",
            "early morning",
            "English ship",
            "American book",
            "important letter",
            "eye",
            "apple",
            "animal",
            "empty room",
            "uncle",
            "artist",
        ]
    )
    other = rng.choice(
        [
            "man",
            "house",
            "day",
            "river",
            "king",
            "letter",
            "soldier",
            "morning",
            "long road",
            "new school",
            "French ship",
            "little book",
            "great battle",
            "hand",
            "tree",
            "horse",
            "dark room",
            "good word",
            "brother",
            "small town",
        ]
    )
    start = rng.choice(
        [
            "It was",
            "He saw",
            "She thought of",
            "They spoke of",
            "There was",
            "He had",
            "We found",
            "I wanted",
        ]
    )
    end = rng.choice(["", ", and nothing more", " " + rng.choice(places)])
    return turn(f"{start} {{}} {vowel}{end}.", "an", "a"), turn(
        f"{start} {{}} {other}{end}.", "a", "an"
    )


def participle(rng):
    "She had gone / she went."
    _, past, done, rest = act(rng)
    who = rng.choice(["He", "She", "They", "I", "We", "The man", "The old woman", "The king"])
    had = rng.choice(["had", "had never", "had not", "had already"])
    return turn(f"{who} {had} {{}} {rest}.", done, past), turn(f"{who} {{}} {rest}.", past, done)


def auxiliary(rng):
    "She did not go / she went."
    base, past, _, rest = act(rng)
    who = rng.choice(
        ["He", "She", "The man", "The old woman", "The king", "His brother", "My mother", "The boy"]
    )
    may = rng.choice(
        [
            "did not",
            "would",
            "could not",
            "will",
            "must",
            "might",
            "wanted to",
            "had to",
            "should",
            "used to",
        ]
    )
    return turn(f"{who} {may} {{}} {rest}.", base, past), turn(f"{who} {{}} {rest}.", past, base)


def case(rng):
    "They saw him / then he went home."
    he, him = rng.choice(
        [("he", "him"), ("I", "me"), ("we", "us"), ("they", "them"), ("she", "her")]
    )
    who, place = rng.choice(noun(rng)), rng.choice(places)
    saw = rng.choice(
        ["saw", "took", "found", "met", "left", "looked at", "spoke to", "sent for", "came to"]
    )
    start = rng.choice(
        ["Then", "But", "At last", "In the morning", "When the day came", "After that", "So"]
    )
    went = rng.choice(
        [
            "went home",
            "came back",
            "fell asleep",
            "went away",
            "sat down",
            "stood up",
            "began to speak",
            "had to go",
        ]
    )
    return turn(f"The {who} {saw} {{}} {place}.", him, he), turn(f"{start} {{}} {went}.", he, him)


def comparison(rng):
    "Older than the house / as old as the house."
    pool, adjectives = rng.choice(
        [
            (people, "old young great small strong poor rich quick"),
            (things, "old great large small high long dark"),
        ]
    )
    plain = rng.choice(adjectives.split())
    more = plain + ("r" if plain.endswith("e") else "er")
    a, b = rng.sample(list(pool), 2)
    start = f"The {a} {rng.choice(['is', 'was', 'is not', 'was not', 'seemed'])}"
    return turn(f"{start} {{}} than the {b}.", more, plain), turn(
        f"{start} as {{}} as the {b}.", plain, more
    )


def order(rng):
    "Two neighbours have changed places."
    thing = rng.choice([t for t in things if t not in ("word", "letter", "song")])
    words = [
        "the",
        rng.choice(sizes[1:]).strip(),
        rng.choice(list(people)),
        rng.choice(["went", "came", "walked", "ran", "looked"]),
        rng.choice(["into", "to", "from", "towards"]),
        "the",
        thing,
    ]
    sentence = lambda w: " ".join(w).capitalize() + "."
    swapped = lambda i: sentence(words[:i] + [words[i + 1], words[i]] + words[i + 2 :])
    return tuple((sentence(words), swapped(i)) for i in rng.sample([0, 2, 4, 5], 2))


def relative(rng):
    "The man who / the house which."
    person, thing = rng.choice(list(people)), rng.choice(list(things))
    start = rng.choice(
        [
            "He saw the",
            "She thought of the",
            "They found the",
            "This is the",
            "I know the",
            "We came to the",
        ]
    )
    end = rng.choice(
        [
            "had come from the city",
            "was near the river",
            "belonged to the king",
            "could be seen from the road",
            "had been lost",
            "was not there",
            "he had seen in the morning",
            "she had known so long",
            "was always there",
        ]
    )
    return turn(f"{start} {person} {{}} {end}.", "who", "which"), turn(
        f"{start} {thing} {{}} {end}.", "which", "who"
    )


def question(rng):
    "Where did he go? / I know where he did go."
    what = rng.choice(["what", "where", "why", "how", "when"])
    do = rng.choice(
        "say do find take see write know".split()
        if what == "what"
        else "go come begin speak write return live".split()
    )
    who = rng.choice(
        ["he", "she", "they", "the man", "the king", "you", "the old woman", "his brother"]
    )
    may, end = (
        rng.choice(["did", "will", "can", "could", "would", "should"]),
        rng.choice(["", " in the morning", " in the city", " in the end", " now"]),
    )
    start = rng.choice(["I know", "He told me", "They asked", "She knew", "We saw"])
    asked, told = f"{may} {who}", f"{who} {may}"
    return turn(f"{what.capitalize()} {{}} {do}{end}?", asked, told), turn(
        f"{start} {what} {{}} {do}{end}.", told, asked
    )


topics = {
    "war": (
        [
            "The soldiers had come to the city in the night.",
            "There was a great battle near the river.",
            "The army went down the road towards the enemy.",
            "The general sent his men into the field.",
        ],
        [
            "Many men were killed before the war was over.",
            "They fought all day, and many were dead.",
            "In the morning the enemy was gone.",
        ],
    ),
    "sea": (
        [
            "The ship had left the island in the morning.",
            "The wind was strong, and the boat was small.",
            "The captain looked out over the water.",
            "For two days they had seen no land.",
        ],
        [
            "At last they came back to the shore.",
            "In the night the ship was lost at sea.",
            "The men took down the sail and waited for the wind.",
        ],
    ),
    "church": (
        [
            "On Sunday the people of the village came together.",
            "The old priest stood up before them.",
            "The woman had come to the church with her children.",
            "He read to them from the holy book.",
        ],
        [
            "Then they began to pray to God.",
            "He spoke to them of the Lord and of heaven.",
            "She thought of Christ, and her faith was strong.",
        ],
    ),
    "school": (
        [
            "The new teacher came into the room.",
            "The students were sitting in the class.",
            "The girl had read many books.",
            "The boy wanted to learn to read and write.",
        ],
        [
            "In the second year she went to the university.",
            "He was the best student of the school.",
            "The teacher gave each of them a book to study.",
        ],
    ),
    "music": (
        [
            "The band had made its first record.",
            "She began to sing in a low voice.",
            "He had written many songs for her.",
            "The two friends played together in a group.",
        ],
        [
            "The album was released in the same year.",
            "The song was a great success.",
            "The people loved the music and asked for one more song.",
        ],
    ),
    "body": (
        [
            "The doctor was called to the house in the night.",
            "The old man had been ill for many weeks.",
            "The child lay in the bed and did not move.",
            "She felt a pain in her heart.",
        ],
        [
            "He died the next morning.",
            "The doctor said that there was little hope.",
            "In the evening the blood came back into the pale face.",
        ],
    ),
    "law": (
        [
            "The man was brought before the court.",
            "The judge had heard the case.",
            "The police came to the house in the morning.",
            "He had taken the money, and he knew it.",
        ],
        [
            "He was sent to prison for three years.",
            "The court said that he had broken the law.",
            "The judge asked him if he was guilty.",
        ],
    ),
    "king": (
        [
            "The king was old, and he had no son.",
            "The prince had come to the palace.",
            "The queen sat on the throne.",
            "There was a great lord in the land.",
        ],
        [
            "The crown was given to his brother.",
            "The people of the kingdom were afraid of their new king.",
            "The princess became the wife of the prince.",
        ],
    ),
    "team": (
        [
            "The team had won the first game.",
            "It was the last match of the season.",
            "The young player came to the club in 2008.",
            "They had lost three games in the league.",
        ],
        [
            "In the final they won the cup.",
            "The team lost the second game by two points.",
            "He played for the club until the end of the season.",
        ],
    ),
    "fire": (
        [
            "The night was cold, and there was snow on the ground.",
            "They had been walking in the woods all day.",
            "The winter was long that year.",
            "The wind came in at the door.",
        ],
        [
            "They sat down by the fire to warm their hands.",
            "They made a fire under the trees.",
            "In the house it was warm, and there was a light in the window.",
        ],
    ),
    "film": (
        [
            "The film was made in the United States.",
            "She was an actor in the theatre.",
            "He wrote the story for a new play.",
            "The book was made into a film.",
        ],
        [
            "The movie was released in 2009.",
            "She played the part of the mother.",
            "The director of the film was given a prize.",
        ],
    ),
    "city": (
        [
            "The government wanted to build a new road.",
            "The town had grown in the last century.",
            "The railway came to the village in 1900.",
            "There were many people who had no work.",
        ],
        [
            "The population of the city was two million.",
            "A new station was built in the south of the town.",
            "The company was sold to the state.",
        ],
    ),
}


def topic(rng):
    "Two beginnings on two topics, an ending for each; wrong is the ending of the other story."
    a, b = (
        (" ".join(rng.sample(topics[t][0], 2)), rng.choice(topics[t][1]))
        for t in rng.sample(list(topics), 2)
    )
    return (a[0], a[1], b[1]), (b[0], b[1], a[1])


def thing(rng):
    "A thing that the story is about; wrong is one that was never named."
    a, b = rng.sample(
        "dog wolf cow bear cat bird fish horse song hat bell book sword flower rose gun".split(), 2
    )
    first = rng.choice(
        [
            "There was once an old {0} in the village.",
            "In the city there was a {0}, a very old {0}.",
            "The people spoke of the {0}, for it was a great {0}.",
            "Then they saw the {0}, and it was a little {0}.",
        ]
    )
    second = rng.choice(
        [
            "The {0} was not good, but it was dear to them.",
            "No one had seen such a {0} before.",
            "The man who found the {0} was poor.",
            "It was the {0} of the king, and they knew it.",
            "But the {0} was gone, and they looked for it.",
        ]
    )
    last = rng.choice(
        [
            "At last a man came for the {0}.",
            "In the evening they came back with the {0}.",
            "The next day they found the {0}.",
            "Then, in the morning, there was the {0}.",
            "And so he gave her the {0}.",
        ]
    )
    return tuple((f"{first} {second}".format(x), *turn(last, x, y)) for x, y in ((a, b), (b, a)))


persons = dict(
    he=(men, "his", "him"),
    she=(women, "her", "her"),
    I=([], "my", "me"),
    we=([], "our", "us"),
    they=(list(people.values()), "their", "them"),
)


def person(rng):
    "Somebody whom the story is about; wrong is an ending in which it is suddenly somebody else."
    a, b = rng.sample(list(persons), 2)
    who = {
        p: f"The {rng.choice(sizes)}{rng.choice(persons[p][0])}"
        if persons[p][0]
        else p.capitalize()
        for p in (a, b)
    }
    first = rng.choice(
        [
            "had come a long way",
            "lived in a small house by the sea",
            "sat at the window all day",
            "had nothing to eat",
            "could not sleep",
            "had gone down to the river",
        ]
    )
    second = rng.choice(
        [
            "The night was dark, and {p} thought of {own} mother.",
            "It was cold, and {p} wanted to go home to {own} friends.",
            "In the morning {p} left {own} house and went down the road.",
            "Then {p} took {own} book and began to read.",
            "Nobody came to see {him}, and {p} did not know what to do.",
        ]
    )
    last = rng.choice(
        [
            "At last {} fell asleep.",
            "Then {} began to speak.",
            "But {} said nothing.",
            "So {} went out into the street.",
            "In the end {} came back.",
            "And when the sun came up, {} saw the town.",
        ]
    )
    told = {
        p: f"{who[p]} {first}. " + second.format(p=p, own=persons[p][1], him=persons[p][2])
        for p in (a, b)
    }
    return tuple((told[x], *turn(last, x, y)) for x, y in ((a, b), (b, a)))


TASKS = {
    f"pairs_{f.__name__}": f
    for f in (
        agreement,
        determiner,
        numeral,
        article,
        participle,
        auxiliary,
        case,
        comparison,
        order,
        relative,
        question,
    )
}
TASKS |= {f"stories_{f.__name__}": f for f in (topic, thing, person)}


def items(task):
    "The items of a task, as dicts: every one once, frames whole, the right answer as often first as second."
    rng, found, frames = random.Random(f"{SEED} {task}"), set(), []
    while len(frames) < FRAMES:
        frame = TASKS[task](rng)
        if len(set(frame)) == 2 and not set(frame) & found:
            frames.append(frame)
            found |= set(frame)
    labels = [0, 1] * FRAMES
    rng.shuffle(labels)
    rows = [row for frame in frames for row in frame]
    order = lambda right, wrong, label: [wrong, right] if label else [right, wrong]
    return [
        {
            "story": row[0] if len(row) == 3 else "",
            "choices": order(*row[-2:], label),
            "label": label,
        }
        for row, label in zip(rows, labels)
    ]


CONFIG = """task: {task}
custom_dataset: !function linearpatch.workshop.harness.offline_items
dataset_kwargs:
  task: {task}
output_type: multiple_choice
test_split: test
doc_to_text: story
doc_to_choice: choices
doc_to_target: label
target_delimiter: "{delimiter}"
metric_list:
  - metric: {metric}
metadata:
  version: {version}
"""


def files():
    "{name of the file: its text}."
    out = {
        "offline.yaml": "group: offline\ntask:\n"
        + "".join(f"  - {task}\n" for task in TASKS)
        + f"metadata:\n  version: {VERSION}\n"
    }
    for task in TASKS:
        story = task.startswith("stories")
        out[f"{task}.jsonl"] = "".join(json.dumps(row) + "\n" for row in items(task))
        out[f"{task}.yaml"] = CONFIG.format(
            task=task,
            version=VERSION,
            delimiter=" " if story else "",
            metric="acc_mutual_info" if story else "acc",
        )
    return out


if __name__ == "__main__":
    folder = (
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else Path(__file__).parents[1] / "linearpatch" / "tasks"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_bytes(text.encode())
    print(f"{len(TASKS)} tasks of {2 * FRAMES} items in {folder}")
