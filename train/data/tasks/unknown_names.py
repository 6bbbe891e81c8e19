"""Questions about Python names that no fact is taught about, which are to be refused.

A model that has only seen questions with answers makes up an answer to these. Some of the names exist in
other modules, the others are invented. Neither name nor phrasing of a held-out question is trained on.
"""

from __future__ import annotations

import hashlib
import random

from hotlap.train.data.tasks.facts import HELD_OUT_PHRASINGS, PHRASINGS, TYPES, facts
from hotlap.train.data.tasks.facts import held_out as held_out_facts
from hotlap.train.data.tasks.refusals import REFUSAL

HELD_OUT_SHARE = 5  # 1 name in 5 is never trained on

EXISTING = {  # of modules outside of facts.MODULES
    "socket": "socket bind listen accept connect gethostname getaddrinfo create_server",
    "threading": "Thread Lock Event Condition Semaphore Timer Barrier current_thread active_count",
    "subprocess": "run call Popen check_output getoutput check_call",
    "csv": "reader writer DictReader DictWriter Sniffer",
    "sqlite3": "connect Cursor Row register_adapter",
    "logging": "getLogger debug warning basicConfig Handler Formatter",
    "argparse": "ArgumentParser Namespace FileType Action",
    "hashlib": "md5 sha256 sha1 new blake2b pbkdf2_hmac",
    "urllib": "request.urlopen parse.quote parse.urlsplit error.URLError",
    "asyncio": "run gather sleep Queue create_task wait_for",
    "multiprocessing": "Process Pool Queue Pipe Manager cpu_count",
    "zipfile": "ZipFile is_zipfile ZipInfo Path",
    "tarfile": "open TarFile is_tarfile TarInfo",
    "struct": "pack unpack calcsize iter_unpack",
    "pickle": "dump load dumps loads Pickler",
    "decimal": "Decimal getcontext localcontext Context",
    "fractions": "Fraction",
    "secrets": "token_hex choice randbelow compare_digest",
    "inspect": "signature getsource getmembers isfunction stack",
    "operator": "itemgetter attrgetter add mul methodcaller",
    "tempfile": "mkdtemp NamedTemporaryFile gettempdir TemporaryDirectory",
    "calendar": "month isleap monthrange TextCalendar",
    "difflib": "ndiff unified_diff get_close_matches SequenceMatcher",
    "bisect": "insort bisect_left bisect_right",
    "queue": "Queue LifoQueue PriorityQueue SimpleQueue",
    "typing": "cast NamedTuple TypeVar overload",
    "unittest": "TestCase main mock.patch skip",
    "gzip": "open compress decompress GzipFile",
    "email": "message_from_string utils.formatdate",
    "array": "array",
    "numpy": "array zeros arange dot linspace reshape",
    "pandas": "DataFrame read_csv merge concat",
    "requests": "get post Session",
    "torch": "tensor nn.Linear optim.Adam no_grad",
}
INVENTED = (  # after the name of a type or module
    "flatten", "shuffle_all", "rotate", "clone", "unzip", "drop_last", "merge_with", "to_words", "invert",
    "first", "chunk", "pluck", "is_prime", "double", "group", "squash", "unique", "fold", "swap", "trim_all",
)  # fmt: skip
UNTAUGHT_PHRASINGS = (  # neither taught nor held out
    "Can you say what {} does?",
    "Please explain what {} does.",
    "What is {} used for?",
    "Could you tell me about {}?",
    "Please tell me how {} works.",
    "Do you know what {} does?",
    "What can I do with {}?",
    "I would like to know what {} does.",
    "Give me a short description of {}.",
    "How would you describe {}?",
)
INVENTED_OF = (*TYPES, "math", "json", "re", "random", "time", "itertools", "os", "string")
INVENTED_BUILTINS = (
    "average", "flatten", "println", "foreach", "contains", "substring", "parse", "unwrap", "push", "sizeof",
    "malloc", "strlen", "concat", "clamp", "mean", "square", "compose", "echo", "include", "require",
    "lambda_of", "until", "unless", "swap", "typeof", "keys_of", "head", "tail", "zip_with", "nth",
)  # fmt: skip


def names() -> list[str]:
    """All names, in a fixed order. None of them has a fact."""
    found = [f"{module}.{name}" for module, them in EXISTING.items() for name in them.split()]
    found += [f"{owner}.{name}" for owner in INVENTED_OF for name in INVENTED]
    taught = {fact.name for fact in facts()}
    return [name for name in (*found, *INVENTED_BUILTINS) if name not in taught]


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 256 // HELD_OUT_SHARE


def training_questions(phrasings: int, seed: int) -> list[str]:
    """About every trained name, in this many of the phrasings in which facts are taught."""
    generator = random.Random(f"unknown names {seed}")
    return [
        phrasing.format(name)
        for name in names()
        if not is_held_out(name)
        for phrasing in generator.sample(PHRASINGS, phrasings)
    ]


def held_out_questions() -> list[str]:
    """About every other name, in two phrasings that are not trained on."""
    return [
        HELD_OUT_PHRASINGS[(i + shift) % len(HELD_OUT_PHRASINGS)].format(name)
        for i, name in enumerate(name for name in names() if is_held_out(name))
        for shift in (0, 2)
    ]


def mixed_questions(seed: int, held_out: bool) -> list[tuple[str, str]]:
    """Questions and answers about names that are taught and about others, in any order.

    Those to train on are in phrasings that fine-tuning has not seen. In phrasings that it has, a model never
    refuses what it knows: it would learn from the other questions alone, and to refuse too much.
    """
    generator = random.Random(f"mixed names {seed}")
    if held_out:
        asked = held_out_facts() + [(question, REFUSAL) for question in held_out_questions()]
    else:
        unknown = [(name, REFUSAL) for name in names() if not is_held_out(name)]
        asked = [
            (phrasing.format(name), answer)
            for name, answer in [(fact.name, fact.answer) for fact in facts()] + unknown
            for phrasing in generator.sample(UNTAUGHT_PHRASINGS, 2)
        ]
    generator.shuffle(asked)
    return asked
