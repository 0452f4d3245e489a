"""Made texts with personal data: templates filled in by Faker, whose tags are known exactly."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kd_lightning.data.options import check_least
from kd_lightning.data.sources.reviews import transfer_sentences
from kd_lightning.data.text.tagged import Place, TaggedCorpus, TaggedText, from_spans
from kd_lightning.data.text.tagging import TaggedData
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.entities import OUTSIDE

TYPES = [
    "GIVEN_NAME", "SURNAME", "EMAIL", "PHONE", "URL", "TAX_ID", "BANK_ACCOUNT", "ROUTING_NUMBER", "GOVERNMENT_ID",
    "PASSPORT", "DRIVERS_LICENSE", "BUILDING_NUMBER", "STREET_NAME", "SECONDARY_ADDRESS", "CITY", "STATE", "ZIP_CODE",
]  # fmt: skip
"""The types of the asset `rampart`, in the order of its classes."""

TEMPLATES = (
    "My name is {GIVEN_NAME} {SURNAME} and I live in {CITY}, {STATE}.",
    "Hello, this is {GIVEN_NAME} calling about the invoice; my number is {PHONE}.",
    "Please send the documents to {EMAIL} before Friday.",
    "{GIVEN_NAME} {SURNAME} moved to {BUILDING_NUMBER} {STREET_NAME}, {CITY}, {STATE} {ZIP_CODE} last spring.",
    "You can reach our office at {PHONE} or write to {EMAIL}.",
    "The portfolio of {GIVEN_NAME} {SURNAME} is at {URL} since March.",
    "For the tax return we need your number, {TAX_ID}, on every page.",
    "Transfer the rent to account {BANK_ACCOUNT} with routing number {ROUTING_NUMBER}.",
    "Her passport {PASSPORT} expires in June and has to be renewed.",
    "The officer wrote down the driver's license {DRIVERS_LICENSE} and let him go.",
    "The national ID on the form reads {GOVERNMENT_ID}, which is not what we have on file.",
    "Ship it to {GIVEN_NAME} {SURNAME}, {BUILDING_NUMBER} {STREET_NAME}, {SECONDARY_ADDRESS}, {CITY} {ZIP_CODE}.",
    "Dear Mr. {SURNAME}, thank you for your order; it leaves {CITY} tomorrow.",
    "Dr. {SURNAME} will see you on Monday at the clinic in {CITY}.",
    "I am writing on behalf of {GIVEN_NAME}, who lost her passport ({PASSPORT}) in {CITY}.",
    "Can you confirm that {EMAIL} belongs to {GIVEN_NAME} {SURNAME}?",
    "The tenant, {GIVEN_NAME} {SURNAME}, rents {SECONDARY_ADDRESS} at {BUILDING_NUMBER} {STREET_NAME}.",
    "According to the register, tax ID {TAX_ID} was issued in {STATE}.",
    "He gave his license number as {DRIVERS_LICENSE}, state of {STATE}.",
    "If the call drops, dial {PHONE} and wait for {GIVEN_NAME}.",
    "Wire transfers go through {ROUTING_NUMBER}; the account is {BANK_ACCOUNT}.",
    "We could not verify the government ID {GOVERNMENT_ID} of {GIVEN_NAME} {SURNAME}.",
    "Pictures of the house in {CITY} are on {URL}, password on request.",
    "{SURNAME}, {GIVEN_NAME}: born in {CITY}, now in {STATE}.",
    "The parcel for {STREET_NAME} {BUILDING_NUMBER} in {ZIP_CODE} {CITY} came back.",
    "Sign in at {URL} with your address {EMAIL} and the code we sent.",
    "My husband {GIVEN_NAME} works in {CITY} and commutes from {STATE}.",
    "Customer {GIVEN_NAME} {SURNAME} wants us to delete {PHONE} from the list.",
    "Attached is a copy of passport no. {PASSPORT}, issued to {GIVEN_NAME} {SURNAME}.",
    "The direct debit from {BANK_ACCOUNT} failed twice this month.",
    "Our bank's routing number has changed to {ROUTING_NUMBER}, please update it.",
    "Is {TAX_ID} the tax ID of the company or of Mrs. {SURNAME}?",
    "They stayed at {BUILDING_NUMBER} {STREET_NAME} until the flood and then left {STATE}.",
    "Forward everything to {SECONDARY_ADDRESS}, {BUILDING_NUMBER} {STREET_NAME}, {CITY}, {STATE} {ZIP_CODE}, thanks.",
    "The witness, {GIVEN_NAME} {SURNAME} of {CITY}, showed license {DRIVERS_LICENSE}.",
    "Nobody picks up at {PHONE}; try {EMAIL} instead.",
    "An application with ID {GOVERNMENT_ID} came from {CITY} this morning.",
    "Mail for ZIP code {ZIP_CODE} is late because of the snow in {STATE}.",
    "See {URL} for what {GIVEN_NAME} wrote about the merger.",
    "Update my record: {GIVEN_NAME} {SURNAME}, {PHONE}, {EMAIL}.",
    "The refund of 40 dollars was paid to account number {BANK_ACCOUNT}.",
    "Professor {SURNAME} and her student {GIVEN_NAME} met in {CITY}.",
    "Renewal of driver license {DRIVERS_LICENSE} takes two weeks.",
    "On page 3 replace {TAX_ID} by the number that {GIVEN_NAME} gave you.",
    "The embassy returned passport {PASSPORT} to Ms. {SURNAME} on 12 May.",
    "Our new branch is in {SECONDARY_ADDRESS}, {BUILDING_NUMBER} {STREET_NAME}, near the station.",
    "I believed that {GOVERNMENT_ID} is a valid identity card number, is it?",
    "{CITY} has 3 offices, {STATE} has 12, and none of them opens on Sunday.",
    "Thanks {GIVEN_NAME}, I have put {URL} into the minutes.",
    "Whoever paid from routing number {ROUTING_NUMBER} forgot the reference.",
)
"""Sentences with gaps. Numbers that stand in them are no personal data."""

AROUND, MOST_PIECES, MOST_WORDS = 4, 4, 20
"""Of a sentence of the transfer set: words on each side of a gap, gaps with their words, and words between them."""

_GAP = re.compile(r"{(\w+)}")


class PersonalData(TaggedData):
    """Sentences with names, addresses and numbers of people who do not exist, made from templates.

    A template is in one split only: test sentences are of templates that nothing was trained on. Of each split the
    templates are filled in turn. Sentences of the transfer set are put together from pieces of the training templates
    and from sentences of other texts, so that values stand among many words.

    Values come from Faker (`pip install 'kd-lightning[faker]'`).

    Args:
        texts: Tagged sentences to train on.
        transfer_texts: Sentences of pieces of the training templates, without tags.
        held_out_texts: Sentences of the validation split, and of the test split.
        validation_fraction: Share of the templates for validation.
        test_fraction: Share of the templates for the test.
        options: Those of `TaggedData`. The pieces stand among the sentences of `transfer`: `amazon`, `nyt`, `tweets`
            (see `Reviews`), files, data sets.

    Raises:
        ConfigError: An option out of its range, or Faker is not installed.
    """

    def __init__(
        self,
        texts: int = 4000,
        transfer_texts: int = 0,
        held_out_texts: int = 1000,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(1, texts=texts, held_out_texts=held_out_texts)
        check_least(0, transfer_texts=transfer_texts)
        fractions = validation_fraction, test_fraction
        held = [round(fraction * len(TEMPLATES)) for fraction in fractions]
        if min(held) < 1 or sum(held) >= len(TEMPLATES):
            raise ConfigError(
                f"data.validation_fraction={validation_fraction} and data.test_fraction={test_fraction} of "
                f"{len(TEMPLATES)} templates leave a split without any: each must be a template at least, and both "
                "together less than all"
            )
        if self.transfer and not transfer_texts:
            raise ConfigError(
                f"data.transfer={self.transfer}: pieces of templates are set among these, and data.transfer_texts=0 "
                "makes none; set data.transfer_texts"
            )
        self.counts = {"train": texts, "transfer": transfer_texts}
        self.counts |= dict.fromkeys(("validation", "test"), held_out_texts)
        self.held_out = held

    def read(self) -> TaggedCorpus:
        """Fill in the templates."""
        parts = dict(zip(("validation", "test", "train"), self._templates(), strict=True))
        made = {}
        for number, (name, count) in enumerate(self.counts.items()):
            values = _values(1000 * self.split_seed + number)
            templates = parts[name if name in parts else "train"]
            if name == "transfer":
                templates = _mixed(templates, self._sentences(), count, self.split_seed)
            made[name] = [_filled(templates[i % len(templates)], values, Place(name, i + 1)) for i in range(count)]
        made["transfer"] = [replace(text, tags=None) for text in made["transfer"]]
        return TaggedCorpus([OUTSIDE, *(f"{begin}-{kind}" for kind in TYPES for begin in "BI")], **made)

    def _sentences(self) -> list[str]:
        """Return sentences that are no templates."""
        found = (text[0] for name in self.transfer for text in transfer_sentences(name))
        return [text for text in found if not _GAP.search(text)]

    def _templates(self) -> list[list[str]]:
        """Return the templates of validation, test and training, at random."""
        cuts = np.cumsum(self.held_out)
        order = np.random.default_rng(self.split_seed).permutation(len(TEMPLATES))
        return [[TEMPLATES[i] for i in part] for part in np.split(order, cuts)]


def _mixed(templates: Sequence[str], sentences: Sequence[str], count: int, seed: int) -> list[str]:
    """Return templates made of pieces of others, set among sentences."""
    pieces = []
    for template in templates:
        parts = _GAP.split(template)
        for at in range(1, len(parts), 2):
            before, behind = parts[at - 1].split(" ")[-AROUND:], parts[at + 1].split(" ")[:AROUND]
            pieces.append(f"{' '.join(before)}{{{parts[at]}}}{' '.join(behind)}".strip())
    generator, made = np.random.default_rng(seed), []
    for _ in range(count):
        chosen = [pieces[i] for i in generator.choice(len(pieces), size=generator.integers(1, MOST_PIECES + 1))]
        words = sentences[int(generator.integers(len(sentences)))].split()[:MOST_WORDS] if sentences else []
        for piece in chosen:
            words.insert(int(generator.integers(len(words) + 1)), piece)
        made.append(" ".join(words))
    return made


def _values(seed: int) -> dict[str, Callable[[], str]]:
    """Return what makes a value of each type."""
    if importlib.util.find_spec("faker") is None:
        raise ConfigError("data=personal_data needs Faker: pip install 'kd-lightning[faker]'")
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(seed)
    return {
        "GIVEN_NAME": fake.first_name, "SURNAME": fake.last_name, "EMAIL": fake.email, "PHONE": fake.phone_number,
        "URL": fake.url, "TAX_ID": fake.ein, "BANK_ACCOUNT": lambda: fake.numerify("%###########"),
        "ROUTING_NUMBER": fake.aba, "GOVERNMENT_ID": lambda: fake.numerify("%########"),
        "PASSPORT": fake.passport_number, "DRIVERS_LICENSE": lambda: fake.bothify("?#######").upper(),
        "BUILDING_NUMBER": fake.building_number, "STREET_NAME": fake.street_name,
        "SECONDARY_ADDRESS": fake.secondary_address, "CITY": fake.city, "STATE": fake.state, "ZIP_CODE": fake.postcode,
    }  # fmt: skip


def _filled(template: str, values: Mapping[str, Callable[[], str]], place: Place) -> TaggedText:
    """Return a template with a value in each gap, which is an entity of the gap's type."""
    text, spans = "", []
    for number, part in enumerate(_GAP.split(template)):
        value = values[part]() if number % 2 else part
        if number % 2:
            spans.append((len(text), len(text) + len(value), part))
        text += value
    return from_spans(text, spans, place, "bio")
