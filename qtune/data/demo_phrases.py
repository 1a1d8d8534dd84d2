"""Words and sentence patterns of the demo data: expense messages, one set of patterns per split.

Only data; `demo.py` puts it together. No pattern is shared between splits, so the test split asks
whether the task was learned and not the wording. The values (names, items) overlap on purpose: the
test split draws from the training values and from some that training never shows.

Slots: {what} the item ({What} at the start of a sentence), {money}, {when} the date, {with} people
named inside the sentence, {project} a project named inside the sentence (both may be empty),
{people}, {code}, {number}, {name}.
"""

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Phrases:
    """The patterns of one split; which field a pattern carries is its attribute name."""

    frames: tuple[str, ...]
    people_inline: tuple[str, ...]
    people_sentence: tuple[str, ...]
    project_inline: tuple[str, ...]
    project_sentence: tuple[str, ...]
    receipt: tuple[str, ...]
    no_receipt: tuple[str, ...]
    alone: tuple[str, ...]
    no_project: tuple[str, ...]
    noise: tuple[str, ...]

    def all(self) -> list[str]:
        """Every pattern of the split."""
        return [pattern for group in vars(self).values() for pattern in group]


TRAIN = Phrases(
    frames=(
        "I paid {money} for {what}{with} on {when}{project}.",
        "On {when} I spent {money} on {what}{with}{project}.",
        "Please book {money} for {what}{with}, dated {when}{project}.",
        "{what}{with} cost me {money} on {when}{project}.",
        "New expense: {what}{with}, {money}, {when}{project}.",
        "{when}: {what}{with}, {money}{project}.",
        "Can you file {money} from {when}? It was {what}{with}{project}.",
        "The bill for {what}{with} came to {money} on {when}{project}.",
        "{money} went to {what}{with} on {when}{project}.",
        "One more for the books: {what}{with} on {when} for {money}{project}.",
        "My claim is {money} for {what}{with}, bought on {when}{project}.",
        "For {what}{with} I was charged {money} on {when}{project}.",
        "Hi, {what}{with} set me back {money} on {when}{project}.",
        "Add {what}{with} to my report, {money} on {when}{project}.",
        "Here is an expense of {money} from {when} for {what}{with}{project}.",
        "I would like to claim {what}{with}. It was {money} on {when}{project}.",
        "Expense date {when}, total {money}, reason {what}{with}{project}.",
        "{what}{with}{project}. Paid {when}, {money} in all.",
        "Could you record {what}{with} at {money} for {when}{project}?",
        "A correction: {what}{with} was {money}, and the date was {when}{project}.",
        "I need {money} back for {what}{with} from {when}{project}.",
        "This is about {what}{with} on {when}{project}. The sum was {money}.",
        "The amount is {money}. I bought {what}{with} on {when}{project}.",
        "Hello, please refund {what}{with}{project}: {money}, {when}.",
        "We needed {what}{with} on {when}{project}, which made {money}.",
        "Total {money} for {what}{with}{project}. The day was {when}.",
        "{money} on {when}, and that was for {what}{with}{project}.",
        "Kindly enter {when}, {what}{with}, {money}{project}.",
        "There is one open item from {when}: {what}{with}, {money}{project}.",
        "I covered {what}{with} on {when}{project} and paid {money}.",
        "My card was charged {money} on {when}, it is {what}{with}{project}.",
        "Note for {when}: {money} for {what}{with}{project}.",
        "As discussed, {what}{with} on {when}{project} for a price of {money}.",
        "The team got {what}{with} for {money} on {when}{project}.",
        "Date: {when}. Item: {what}{with}. Amount: {money}{project}.",
        "Item: {what}{with}. Amount: {money}. Date: {when}{project}.",
        "You still owe me {money} for {what}{with}{project}, see {when}.",
        "Good morning, I had {what}{with} on {when}{project}, price {money}.",
        "{what}{with} again{project}, {money} this time, on {when}.",
        "Spent {money}, {what}{with}, {when}{project}.",
        "In my notes for {when} I see {what}{with} and {money}{project}.",
        "It was {when} when I paid {money} for {what}{with}{project}.",
        "Because of the visit I took {what}{with} on {when}{project}, {money} in total.",
        "The price of {what}{with} on {when}{project} was {money}.",
    ),
    people_inline=(
        " with {people}",
        " together with {people}",
        " for {people}",
        " (with {people})",
        " shared with {people}",
        " for me and {people}",
        " along with {people}",
        " beside {people}",
    ),
    people_sentence=(
        "{people} came along.",
        "{people} joined me.",
        "With me: {people}.",
        "Attendees: {people}.",
        "I was there with {people}.",
        "{people} took part.",
        "Guests: {people}.",
        "It was shared by {people}.",
        "The group was {people}.",
        "Also there: {people}.",
        "{people} came too.",
        "I invited {people}.",
    ),
    project_inline=(
        " for project {code}",
        ", project {code}",
        " (project {code})",
        ", charged to {code}",
        " under {code}",
        " on project {code}",
        ", booked on {code}",
        " (job {code})",
    ),
    project_sentence=(
        "Put it on project {code}.",
        "The project is {code}.",
        "Charge it to {code}.",
        "Project: {code}.",
        "It belongs to project {code}.",
        "Use project {code} for it.",
        "This is for {code}.",
        "Book it on {code}, please.",
        "The job number is {code}.",
        "We did this for project {code}.",
    ),
    receipt=(
        "Receipt attached.",
        "The receipt is attached.",
        "I have scanned the receipt.",
        "Here is the receipt.",
        "I added the receipt below.",
        "I kept the receipt.",
        "I have the receipt here.",
        "My receipt is in the folder.",
    ),
    no_receipt=(
        "No receipt, sorry.",
        "I lost the receipt.",
        "The receipt is missing.",
        "There was no receipt.",
        "I do not have a receipt.",
        "They gave me no receipt.",
        "I forgot the receipt.",
    ),
    alone=("I was on my own.", "Nobody else was there.", "It was just me.", "I came by myself."),
    no_project=(
        "No project this time.",
        "It is not for any project.",
        "There is no project number.",
        "Leave the project empty.",
    ),
    noise=(
        "Thanks a lot.",
        "Let me know if anything is unclear.",
        "The queue took {number} minutes.",
        "My extension is {number}.",
        "The invoice number is {number}.",
        "Their reference was {number}.",
        "My manager knows about it.",
        "It rained all day.",
        "Approved by {name}.",
        "{name} from accounting asked for this.",
        "Please tell {name} when it is done.",
        "{name} has signed it already.",
        "Copy to {name}, please.",
        "Our limit is {money}.",
        "The budget was {money}.",
        "I am away until Monday.",
        "Sorry for the late message.",
        "We stayed for {number} minutes.",
        "The table number was {number}.",
        "No hurry with this one.",
        "Please confirm by Friday.",
        "I will call you next week.",
    ),
)

VALIDATION = Phrases(
    frames=(
        "Mind entering {what}{with}? I gave {money} on {when}{project}.",
        "I am reporting {what}{with}{project}; {money} left my account on {when}.",
        "Back on {when} there was {what}{with}{project}, worth {money}.",
        "Costs of {money} arose on {when} through {what}{with}{project}.",
        "Quick one: {when}, {money}, {what}{with}{project}.",
        "Dear all, {what}{with} amounted to {money}{project}, on {when}.",
        "Reimburse {money} please, I got {what}{with} on {when}{project}.",
        "I settled {what}{with} on {when}{project}; they took {money}.",
        "Open claim, {money}, day {when}, {what}{with}{project}.",
        "What I bought on {when}{project} was {what}{with}, at {money}.",
    ),
    people_inline=(" accompanied by {people}", " (visitors {people})", " next to {people}"),
    people_sentence=(
        "{people} were with me.",
        "Those present: {people}.",
        "My company was {people}.",
    ),
    project_inline=(", for job {code}", " within project {code}", ", on account of {code}"),
    project_sentence=(
        "Please assign it to {code}.",
        "Project code {code} applies.",
        "The costs go to {code}.",
    ),
    receipt=("You will find the receipt attached.", "A photo of the receipt follows."),
    no_receipt=("Sadly the receipt is gone.", "I never got a receipt."),
    alone=("I went alone.", "No one came with me."),
    no_project=("No project applies here.", "It has no project."),
    noise=(
        "Many thanks for your help.",
        "The order number was {number}.",
        "We waited {number} minutes.",
        "{name} gave the approval.",
        "Let {name} know, please.",
        "I am back on Tuesday.",
    ),
)

TEST = Phrases(
    frames=(
        "Would you log {what}{with} for me? The cost was {money} on {when}{project}.",
        "I got {what}{with} on {when}{project} and it came out at {money}.",
        "Submitting {money} for {what}{with}{project}, purchase of {when}.",
        "Dear team, {when} brought us {what}{with}{project}, {money} altogether.",
        "They billed me {money} when I ordered {what}{with} on {when}{project}.",
        "Reason for this claim is {what}{with}{project}. I handed over {money} on {when}.",
        "Please take care of {what}{with}, which on {when} ran to {money}{project}.",
        "Out of pocket {money} since {when}: {what}{with}{project}.",
        "Regarding {when}, I put {money} towards {what}{with}{project}.",
        "Small expense again, {what}{with}{project}, {when}, for {money}.",
        "For the month's report: {money}, spent {when}, {what}{with}{project}.",
        "Someone had to pay for {what}{with}{project}, so on {when} I did, {money}.",
        "Entry of {when}{project}. {What}{with}. {money} was what it took.",
        "I am claiming {what}{with}{project}, paid with {money} back on {when}.",
    ),
    people_inline=(" in company of {people}", " joined by {people}", " plus {people}"),
    people_sentence=(
        "{people} sat with us.",
        "People there: {people}.",
        "I went with {people}.",
        "It was me and {people}.",
        "Participants were {people}.",
    ),
    project_inline=(
        ", part of project {code}",
        " (for {code})",
        ", to be charged on {code}",
        " in project {code}",
    ),
    project_sentence=(
        "Allocate this to {code}.",
        "The right project would be {code}.",
        "It should run under {code}.",
        "Our project {code} pays.",
    ),
    receipt=(
        "I enclosed the receipt.",
        "The receipt comes with this mail.",
        "Please see the attached receipt.",
    ),
    no_receipt=(
        "Unfortunately I have no receipt.",
        "The receipt got lost on the way.",
        "I could not get a receipt.",
    ),
    alone=("There was only me.", "I did that alone.", "No other guests."),
    no_project=("There is no project for it.", "Without any project.", "A project is not needed."),
    noise=(
        "Have a nice day.",
        "The booking number was {number}.",
        "It lasted {number} minutes.",
        "Call me on {number} for questions.",
        "{name} already approved this.",
        "Please inform {name} afterwards.",
        "The limit would be {money}.",
        "I return on Thursday.",
        "Take your time.",
    ),
)

PHRASES: dict[Split, Phrases] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

# category -> (items everyone uses, items only the test split uses, what may follow the item)
ITEMS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "meals": (
        ("lunch", "dinner", "breakfast", "coffee and cake", "sandwiches", "a working lunch",
         "pizza", "a team dinner", "snacks and drinks", "soup and bread", "a late supper",
         "noodles", "burgers", "a business lunch", "tea and biscuits"),
        ("brunch", "pasta and salad", "a quick breakfast"),
        ("", " at {vendor}", " in {city}"),
    ),
    "travel": (
        ("a train ticket", "a taxi ride", "a flight", "parking", "a rental car", "bus tickets",
         "a cab", "fuel", "train seats", "the airport shuttle", "a ferry ticket", "a tram pass",
         "road tolls", "a return flight", "a metro card"),
        ("a bus ride", "a night train", "a taxi and a train"),
        ("", " to {city}", " from {city}", " in {city}"),
    ),
    "lodging": (
        ("a hotel room", "two hotel nights", "a hostel bed", "a guest house", "one night of hotel",
         "a holiday flat", "a motel room", "three nights in a hotel", "a room at an inn",
         "an apartment for the week", "an overnight stay", "bed and breakfast"),
        ("a single hotel room", "four nights at a hostel", "a rented flat"),
        ("", " in {city}", " near {city}"),
    ),
    "office": (
        ("printer paper", "toner", "pens and notebooks", "a desk lamp", "a keyboard", "envelopes",
         "a whiteboard", "an office chair", "staplers", "printer ink", "folders and labels",
         "a headset", "a computer mouse", "sticky notes", "a monitor stand"),
        ("pencils and erasers", "an office desk", "a second monitor"),
        ("", " from {vendor}", " at {vendor}"),
    ),
    "software": (
        ("a software licence", "cloud storage", "a domain renewal", "an app subscription",
         "web hosting", "an antivirus licence", "a database plan", "a design app",
         "a video call plan", "server rental", "an editor licence", "a password manager"),
        ("a cloud subscription", "a backup app", "a mail server plan"),
        ("", " from {vendor}", " by {vendor}"),
    ),
    "training": (
        ("a workshop", "an online course", "a conference ticket", "a seminar", "a language class",
         "a training day", "exam fees", "a first aid course", "a textbook", "a webinar",
         "a safety training", "a coaching session"),
        ("a writing workshop", "a course in statistics", "a conference pass"),
        ("", " at {vendor}", " in {city}", " by {vendor}"),
    ),
}  # fmt: skip

CURRENCIES: dict[str, tuple[str, ...]] = {
    "USD": ("${amount}", "{amount} dollars", "USD {amount}", "{amount} USD"),
    "EUR": ("€{amount}", "{amount} euros", "EUR {amount}", "{amount} EUR"),
    "GBP": ("£{amount}", "{amount} pounds", "GBP {amount}", "{amount} GBP"),
    "CHF": ("CHF {amount}", "{amount} francs", "{amount} CHF", "{amount} Swiss francs"),
}

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

DATES = (
    "{month} {day}, {year}",
    "{day} {month} {year}",
    "{short} {day}, {year}",
    "{day} {short} {year}",
    "{month} {day}{ordinal}, {year}",
    "the {day}{ordinal} of {month} {year}",
    "{year}-{mm}-{dd}",
    "{year}/{mm}/{dd}",
)

NAMES = (
    "Ada", "Adam", "Aiko", "Alan", "Alice", "Amara", "Amir", "Ana", "Anders", "Anna", "Anton",
    "Aria", "Arun", "Asha", "Ben", "Bianca", "Boris", "Bruno", "Carla", "Carlos", "Cecile", "Chen",
    "Chloe", "Clara", "Daniel", "Daria", "David", "Deepa", "Diego", "Dina", "Edith", "Elena",
    "Elias", "Emil", "Emma", "Enzo", "Erik", "Esther", "Eva", "Fatima", "Felix", "Fiona", "Frank",
    "Gita", "Grace", "Greta", "Hana", "Hans", "Hassan", "Helen", "Hugo", "Ibrahim", "Ines",
    "Ingrid", "Irene", "Ivan", "Jack", "James", "Jim", "Jasmin", "Joel", "Jonas", "Judith", "Julia",
    "Karim", "Karin", "Kate", "Kenji", "Lars", "Laura", "Leila", "Leo", "Lily", "Linda", "Lucas",
    "Lucy", "Luis", "Maria", "Marco", "Marie", "Martin", "Mei", "Mia", "Mona", "Nadia", "Nina",
    "Noah", "Nora", "Olga", "Oliver", "Omar", "Oscar", "Paul", "Paula", "Pedro", "Peter", "Petra",
    "Priya", "Rafael", "Raj", "Rita", "Robert", "Rosa", "Ruth", "Samir", "Sara", "Sofia", "Stefan",
    "Sven", "Tara", "Theo", "Thomas", "Tina", "Tom", "Uma", "Vera", "Victor", "Wei", "Yara",
    "Yusuf", "Zoe",
)  # fmt: skip
TEST_NAMES = (
    "Agnes", "Andre", "Astrid", "Caleb", "Claudia", "Dmitri", "Farid", "Gloria", "Henry", "Isabel",
    "Kofi", "Lena", "Magnus", "Nils", "Pablo", "Rachel", "Simon", "Tanya", "Ulrich", "Yuki",
)  # fmt: skip

CITIES = (
    "Athens", "Basel", "Bergen", "Berlin", "Boston", "Bristol", "Chicago", "Cork", "Dallas",
    "Denver", "Dublin", "Geneva", "Ghent", "Graz", "Hamburg", "Helsinki", "Kyoto", "Leeds",
    "Lisbon", "London", "Lyon", "Madrid", "Milan", "Munich", "Naples", "Oslo", "Paris", "Porto",
    "Prague", "Riga", "Rome", "Seattle", "Seville", "Toronto", "Turin", "Utrecht", "Vienna",
    "Warsaw", "York", "Zurich",
)  # fmt: skip

VENDOR_FIRST = (
    "Amber", "Blue", "Bright", "Copper", "Crystal", "Eastern", "Golden", "Green", "Happy", "Little",
    "Northern", "Old", "Quiet", "Red", "Royal", "Silver", "Stone", "Sunny", "White", "Wild",
)  # fmt: skip
VENDOR_LAST = (
    "Anchor", "Bridge", "Corner", "Dragon", "Falcon", "Garden", "Harbor", "Heron", "House",
    "Lantern", "Maple", "Market", "Mill", "Mountain", "Oak", "Pine", "River", "Station", "Tower",
    "Wheel",
)  # fmt: skip
