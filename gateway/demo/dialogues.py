"""The dialogues the demonstration model learns: two support desks, written by a seeded generator.

A fact is a thing (`a transfer abroad`) and an aspect of it (its fee) with one fixed answer. A question is a frame of
the aspect around one of the thing's names: "what does {thing} cost". The last fifth of every table of wordings is held out, whole:
frames, wrappers around a question, requests, complaint and form templates, subjects outside the desks. A held-out
paraphrase is a sentence that training never saw, around any thing; what it means the model must infer from its words.

Pure: the same seed writes the same dialogues everywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

UNKNOWN = "I don't know. I can help with the services of this desk."
HELD_OUT_SHARE = 5  # the last fifth of each table of wordings, at least one


class Group(StrEnum):
    FACT = "fact"
    LONG = "explanation"
    COMPLAINT = "complaint summary"
    FORM = "json form"
    SMALL_TALK = "small talk"
    UNKNOWN = "out of scope"
    REPEAT = "repetition"  # trained only: nobody asks for it, but it teaches to copy what was never seen


@dataclass(frozen=True, slots=True)
class Dialogue:
    group: Group
    messages: tuple[dict[str, str], ...]  # role, content; ends with the user's
    answer: str


@dataclass(frozen=True, slots=True)
class Fact:
    aspect: str
    names: tuple[str, ...]  # of the thing asked about
    answer: str


FRAMES: dict[str, tuple[str, ...]] = {
    "fee": (
        "what does {} cost", "how much does {} cost", "how much is {}", "what is the fee for {}", "what is the price of {}",
        "what do you charge for {}", "is there a fee for {}", "what are the costs of {}", "how much do I pay for {}",
        "tell me the fee for {}", "the fee for {}", "how high is the fee for {}", "I want to know what {} costs",
        "what will {} cost me", "tell me the price of {}", "do I pay a fee for {}",
    ),
    "deadline": (
        "what is the cut-off time for {}", "until when can I send in {}", "by when do you need {}", "when is the deadline for {}",
        "what is the deadline for {}", "how late can I order {}", "what is the latest time for {}", "until what time do you take {}",
        "tell me the cut-off for {}", "when is it too late for {}", "the deadline for {}", "how late may I send {}",
        "tell me the deadline for {}", "what is the cut-off of {}",
    ),
    "documents": (
        "what do I need to bring for {}", "which documents do I need for {}", "what papers are required for {}",
        "what should I bring for {}", "which papers do you need for {}", "what documents are needed for {}",
        "what do you need from me for {}", "tell me the documents for {}", "the papers for {}", "what must I show for {}",
        "do I need any documents for {}", "what papers do I bring for {}",
    ),
    "duration": (
        "how long does {} take", "how many days does {} take", "when will {} be done", "how soon is {} done",
        "how much time does {} take", "what is the processing time of {}", "how long do I wait for {}",
        "tell me how long {} takes", "how fast is {}", "how long is the wait for {}", "after how many days is {} done",
        "how long until {} is done", "how many days do I wait for {}",
    ),
    "hours": (
        "when is {} open", "what are the opening hours of {}", "at what times is {} open", "when does {} open",
        "until when is {} open", "tell me the hours of {}", "what time does {} close", "is {} open on Saturday",
        "when can I visit {}", "the opening hours of {}", "which hours is {} open", "when do you open {}",
    ),
    "where": (
        "where is {}", "where do I find {}", "how do I get to {}", "what is the address of {}", "in which street is {}",
        "tell me where {} is", "on which floor is {}", "can you tell me the way to {}", "the address of {}",
        "where can I find {}", "what is the way to {}",
    ),
    "contact": (
        "how do I reach {}", "what is the number of {}", "how can I contact {}", "how do I call {}", "how can I get in touch with {}",
        "tell me how to reach {}", "who do I call for {}", "how do I speak to {}", "the number of {}",
        "is there a number for {}", "how can I call {}",
    ),
    "limit": (
        "what is the limit for {}", "how much can I use with {}", "is there a limit for {}", "what is the maximum of {}",
        "how high is the limit of {}", "tell me the limit of {}", "how much is allowed for {}", "what is the highest amount for {}",
        "the limit for {}", "is there a maximum for {}", "tell me the maximum of {}",
    ),
}  # fmt: skip

FACTS: tuple[Fact, ...] = (
    Fact("fee", ("a transfer abroad", "an international transfer", "sending money abroad"), "A transfer abroad costs 12 euros."),
    Fact("fee", ("a domestic transfer", "a transfer within the country", "a national transfer"), "Domestic transfers are free of charge."),
    Fact("fee", ("a new card", "a replacement card", "another bank card"), "A replacement card costs 8 euros."),
    Fact("fee", ("an account", "a current account", "keeping an account"), "A current account costs 4 euros a month."),
    Fact("fee", ("cash abroad", "withdrawing cash abroad", "a cash withdrawal abroad"), "Cash abroad costs 2 percent, at least 5 euros."),
    Fact("fee", ("a paper statement", "a printed statement", "a statement by post"), "A paper statement costs 1 euro."),
    Fact("fee", ("a safe deposit box", "a safe", "a deposit box"), "A safe deposit box costs 60 euros a year."),
    Fact("deadline", ("a transfer", "a payment order", "transfers"), "Transfers sent before 16:00 are booked the same day."),
    Fact("deadline", ("an instant payment", "instant payments", "an instant transfer"), "Instant payments run at any time, day and night."),
    Fact("deadline", ("a foreign currency order", "foreign currency", "currency orders"), "Order foreign currency before 11:00 to get it the next day."),
    Fact("documents", ("an account", "opening an account", "a new account"), "Please bring your passport and a proof of address."),
    Fact("documents", ("a loan", "a loan application", "applying for a loan"), "For a loan we need three payslips and your passport."),
    Fact("documents", ("a mortgage", "a mortgage application", "a home loan"), "For a mortgage we need the land register extract and two tax returns."),
    Fact("duration", ("a transfer abroad", "an international transfer", "sending money abroad"), "A transfer abroad takes two working days."),
    Fact("duration", ("a loan decision", "the decision on a loan", "deciding on a loan"), "We decide on a loan within five working days."),
    Fact("duration", ("a new card", "a replacement card", "another bank card"), "A new card arrives within seven days."),
    Fact("hours", ("the branch", "the bank branch", "the bank"), "The branch is open from 9:00 to 17:00, Monday to Friday."),
    Fact("hours", ("the hotline", "the phone line", "the telephone service"), "The hotline is open day and night."),
    Fact("where", ("the branch", "the bank branch", "the bank"), "The branch is at 5 Market Street."),
    Fact("contact", ("the card service", "the card desk", "card support"), "Call the card service at extension 200."),
    Fact("contact", ("the loan team", "the loan desk", "a loan adviser"), "Call the loan team at extension 300."),
    Fact("limit", ("a card payment", "card payments", "paying by card"), "The card limit is 2,000 euros a day."),
    Fact("limit", ("a cash withdrawal", "cash withdrawals", "withdrawing cash"), "The cash limit is 1,000 euros a day."),
    Fact("limit", ("an online transfer", "online transfers", "a transfer in the app"), "The online limit is 10,000 euros a day."),
    Fact("fee", ("a vaccination certificate", "a copy of the vaccination record", "a vaccination record"), "A vaccination certificate costs 10 euros."),
    Fact("fee", ("a missed appointment", "missing an appointment", "not coming to an appointment"), "A missed appointment costs 25 euros."),
    Fact("fee", ("a single room", "a room of my own", "a private room"), "A single room costs 70 euros a night."),
    Fact("fee", ("parking", "the car park", "a parking place"), "Parking costs 2 euros an hour."),
    Fact("deadline", ("cancelling an appointment", "a cancellation", "an appointment change"), "Please cancel an appointment 24 hours before."),
    Fact("deadline", ("a prescription", "a repeat prescription", "prescriptions"), "Repeat prescriptions ordered before 12:00 are ready the next day."),
    Fact("deadline", ("a blood sample", "blood samples", "a blood test"), "Blood samples are taken until 10:30."),
    Fact("documents", ("an appointment", "a first visit", "my first appointment"), "Please bring your insurance card and your medication list."),
    Fact("documents", ("an operation", "a surgery", "the day of surgery"), "For an operation please bring the consent form and your allergy card."),
    Fact("documents", ("an X-ray", "a radiology visit", "the X-ray"), "For an X-ray please bring the referral letter."),
    Fact("duration", ("a blood test", "the blood results", "a blood result"), "Blood results take one working day."),
    Fact("duration", ("an X-ray report", "the radiology report", "the X-ray report"), "The X-ray report takes three working days."),
    Fact("duration", ("a referral", "the referral letter", "writing a referral"), "A referral letter takes two working days."),
    Fact("hours", ("the clinic", "the health clinic", "the outpatient clinic"), "The clinic is open from 8:00 to 18:00, Monday to Saturday."),
    Fact("hours", ("the pharmacy", "the clinic pharmacy", "the medicine counter"), "The pharmacy is open from 9:00 to 19:00."),
    Fact("hours", ("the laboratory", "the lab", "the blood lab"), "The laboratory is open from 7:00 to 15:00."),
    Fact("where", ("the pharmacy", "the clinic pharmacy", "the medicine counter"), "The pharmacy is on the ground floor, next to the entrance."),
    Fact("where", ("the laboratory", "the lab", "the blood lab"), "The laboratory is on the second floor, room 210."),
    Fact("where", ("the clinic", "the health clinic", "the outpatient clinic"), "The clinic is at 12 Garden Road."),
    Fact("contact", ("the appointment desk", "the front desk", "reception"), "Call the appointment desk at extension 100."),
    Fact("contact", ("the emergency room", "the emergency service", "emergency care"), "In an emergency call 112 at once."),
)  # fmt: skip

# Whole requests with one answer: (wordings, answer).
REQUESTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "my card was stolen", "I lost my card", "somebody stole my bank card", "I cannot find my card", "my bank card is gone",
            "my card is missing", "I have lost my bank card", "my card has been stolen", "please block my card", "block my lost card",
            "my wallet with the card was stolen", "I think I lost my card",
        ),
        "Your card can be blocked at any time. Call the card service at extension 200 now.",
    ),
    (
        (
            "I want to make an appointment", "can I book an appointment", "I need an appointment", "please give me an appointment",
            "I would like an appointment", "book me an appointment", "how do I book an appointment", "can I get an appointment",
            "I want to see a doctor", "I need to see a doctor", "make an appointment for me", "how can I make an appointment",
        ),
        "Appointments are free on Tuesday at 10:00 and Thursday at 14:30. Which one suits you?",
    ),
    (
        (
            "what is the test card number", "give me the test card number", "which card number is for tests", "tell me the test card number",
            "I need the test card number", "what number does the test card have", "do you have a test card number", "show me the test card number",
        ),
        "The test card number is 4111 1111 1111 1111. It is for tests only.",
    ),
    (
        (
            "I forgot my password", "I cannot log in", "how do I reset my password", "reset my password", "my login does not work",
            "I lost my password", "I need a new password", "my password does not work", "please reset my login", "how can I change my password",
        ),
        "Open the app, choose \"Forgot password\" and follow the link we send you.",
    ),
)  # fmt: skip

EXPLANATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "I would like to open an account", "show me how to open an account", "what do I do to open an account",
            "guide me through opening an account", "how is an account opened", "in which steps do I open an account",
            "explain how to open an account step by step", "how do I open an account", "how can I open an account", "explain how I open an account",
            "tell me step by step how to open an account", "what are the steps to open an account", "describe how to open an account",
            "how does opening an account work", "I want to open an account, how does it work", "please explain how an account is opened",
        ),
        "Opening an account takes five steps. First, choose the account that suits you on our web page. Second, fill in the form "
        "with your name, your address and your tax number. Third, bring your passport and a proof of address to the branch, or show "
        "them in a video call. Fourth, sign the contract and choose a secret number for your card. Fifth, wait for the letter with "
        "your card, which arrives within seven days. After that the account is open, and you can send and receive money.",
    ),
    (
        (
            "I have an operation, how do I prepare", "how does one prepare for an operation", "guide me through preparing for surgery",
            "in which steps do I prepare for an operation", "I have surgery soon, what must I do",
            "explain how to prepare for an operation", "how do I prepare for an operation", "how should I prepare for surgery",
            "what must I do before an operation", "tell me how to prepare for an operation", "what should I do before surgery",
            "describe how to prepare for an operation", "how can I get ready for an operation", "what do I do before an operation",
            "explain how to get ready for surgery", "what happens before an operation, how do I prepare", "show me how to prepare for surgery",
            "please explain how to prepare for surgery", "tell me what to do before an operation", "what should I do before an operation",
        ),
        "Please prepare for an operation in five steps. First, do not eat anything for six hours before. Second, drink only clear "
        "water until two hours before. Third, bring the consent form, your allergy card and the list of your medicines. Fourth, leave "
        "rings and other valuables at home. Fifth, ask somebody to take you home afterwards, because you must not drive that day. "
        "The ward calls you on the day before and tells you when to come.",
    ),
)  # fmt: skip

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello, are you there", "hi, is anybody there", "good morning to you", "a very good morning", "hello, good day", "hey there", "hi, hello",
      "good evening to you", "hello, nice to meet you", "hello again", "good day to you", "morning", "evening", "dear team, hello",
      "hello", "hi", "good morning", "hi there", "hello there", "good evening", "hey", "good day", "greetings", "hello and good day",
      "hi, good morning", "hello everybody", "good afternoon", "hi, good evening", "hello, good morning"),
     "Hello! How can I help you?"),
    (("I thank you", "thank you for the answer", "thanks for that", "good, thank you", "okay, thanks", "thank you, that is clear",
      "thank you kindly", "I am grateful", "that was helpful", "super, thank you", "alright, thanks", "thanks, that is all I wanted",
      "thank you", "thanks", "thanks a lot", "thank you very much", "many thanks", "that helped", "thanks for your help", "great, thanks",
      "perfect, thank you", "thank you so much", "wonderful, many thanks", "that helped, thank you", "thanks, that helped", "thank you for your help"),
     "You are welcome."),
    (("that is all, goodbye", "I have to go, bye", "bye then", "bye for now", "goodbye, and have a nice evening", "take care, bye",
      "farewell", "good night", "see you tomorrow", "talk to you later", "I am leaving now, goodbye", "have a nice evening",
      "so long", "okay, bye", "see you later then",
      "goodbye", "bye", "see you", "bye bye", "have a nice day", "goodbye then", "see you soon", "have a good day, bye", "until next time",
      "see you next time", "goodbye and have a nice day", "bye, see you"),
     "Goodbye, and have a good day."),
    (("who is this", "who am I talking to", "with whom do I speak", "am I speaking with a human", "is there a person behind this",
      "what kind of program are you", "are you a computer", "are you real", "do I speak with a computer", "what should I call you",
      "who answers me here", "are you a chatbot", "is this a human",
      "who are you", "what are you", "are you a person", "are you a robot", "what is your name", "am I talking to a machine", "are you human",
      "tell me who you are", "do you have a name", "is this a machine", "am I talking to a robot", "are you a machine", "am I talking to a person"),
     "I am the assistant of the support desk, a computer program."),
    (("what do you offer", "what are your tasks", "what are you able to do", "what is your job", "which topics do you know",
      "what sort of questions do you take", "what do you know about", "with what can you help", "tell me how you can help",
      "which services do you explain", "what help do you give", "what may I ask you",
      "what can you do", "how can you help me", "what can I ask you", "what do you know", "what are you good for", "what can you tell me",
      "what do you do", "which questions can you answer", "tell me what you can do", "how can you help", "what can I ask", "what do you help with"),
     "I answer questions about fees, times, documents and appointments."),
)  # fmt: skip

_SUBJECTS = (
    "the ocean", "a trip to Norway", "cats and dogs", "medieval knights", "solar panels", "the violin", "pancakes", "rivers in Africa",
    "the planet Mars", "basketball", "the first computer", "tea", "painting", "the largest desert", "cooking rice", "cameras", "trees",
    "airplanes", "Beethoven", "the theory of numbers", "hiking boots", "frogs", "the human brain", "marathon running", "a birthday poem",
    "trains in Switzerland", "old coins", "magic tricks", "the sun", "kites", "the news of today", "a recipe for bread", "lightning",
    "the age of the earth", "the best film", "cheese", "swimming", "famous bridges", "the alphabet", "dragons", "the king of Spain",
    "the capital of France", "the weather tomorrow", "the height of Mount Everest", "black holes", "the Roman Empire", "quantum physics",
    "the best pizza in town", "football", "the next election", "the moon", "dinosaurs", "a good novel", "the stock market", "jazz",
    "the speed of light", "climate", "Greek gods", "chess openings", "the French Revolution", "volcanoes", "electric cars", "my horoscope",
    "the population of Japan", "whales", "poetry", "the history of bread", "a holiday in Spain", "space travel", "rock music", "gardening",
    "the Olympic Games", "old castles", "computer games", "the deepest lake", "mushrooms", "the fastest train", "penguins", "algebra",
    "the price of gold", "the meaning of life", "robots", "the president", "Shakespeare", "snow", "vegetable soup", "a birthday cake",
    "the Eiffel Tower", "tennis", "butterflies", "the Second World War", "opera", "DNA", "sailing", "the Sahara", "elephants", "ballet",
    "bicycles", "the solar system", "coffee", "Mozart", "earthquakes", "tigers", "fishing", "the internet", "chocolate", "Rembrandt",
    "the Amazon river", "guitars", "philosophy", "the tides", "honey bees", "skiing", "the Great Wall", "fashion", "wine", "rainbows",
)  # fmt: skip
_OUTSIDE = (
    "where does {} come from", "what makes {} special", "when was {} first seen", "how many books are there about {}",
    "sing a song about {}", "write a letter about {}", "compare {} with something else", "is {} good for children", "how big is {}",
    "give me three facts about {}", "write a program about {}", "what colour is {}", "what would you say about {}",
    "describe {} to me", "who likes {}", "solve a riddle about {}", "where can I read about {}", "is {} better than before",
    "give me advice about {}", "tell me a story about {}", "what happened to {}", "how do I learn {}", "make a list about {}",
    "what is {}", "tell me about {}", "what do you think about {}", "write a poem about {}", "who invented {}", "explain {}",
    "give me a joke about {}", "what is the history of {}", "do you like {}", "how does {} work", "write a story about {}",
    "what is new about {}", "translate {} into German", "why is {} so important", "who knows most about {}", "draw {}",
    "I want to learn about {}", "how old is {}", "what can you say about {}", "is {} dangerous", "write an essay about {}",
    "what do people like about {}", "tell me a fact about {}", "give me a short text about {}", "what do you know about {}",
)  # fmt: skip

_WRAPPERS = (
    "{Q}?", "{Q}?", "{Q}?", "{Q}?", "{Q}?", "{Q}", "{Q}", "{q}", "{q}", "{q}?", "Hello. {Q}? I look forward to your answer.",
    "Many thanks in advance. {Q}?", "{Q}? Thanks!", "{Q}? Thanks a lot.", "{Q}? Many thanks, {person}", "Thanks for your help. {Q}?",
    "{Q}? Best wishes, {person}", "{Q}? Yours, {person}", "{Q}? Good bye, {person}", "{Q}? I thank you for an answer.", "Tell me: {q}?",
    "A fast answer, please: {q}?", "{person} asks: {q}?", "Just wondering: {q}?", "I was asked this: {q}?", "Dear support, {q}?", "{Q}? It is urgent.", "My mother asks: {q}?",
    "{Q}? I could not find it.", "Good day, {q}?", "Good evening. {Q}? {person}", "{person} here, {q}?", "I need to know this. {Q}?",
    "Hey, {q}?", "May I ask something? {Q}?", "For my sister {person}: {q}?", "I am new here. {Q}?", "{Q}? My phone is [PHONE].",
    "{Q}? Write to [EMAIL], please.", "Could somebody say: {q}?", "Again: {q}?", "{Q}? Kind regards, {person}", "A short question. {Q}?",
    "Hello, {q}?", "Hi, {q}?", "Please, {q}?", "Excuse me, {q}?", "Good morning, {q}?",
    "I have a question: {q}?", "One question: {q}?", "{Q}, please?", "Can you help me? {Q}?", "My email is [EMAIL]. {Q}?",
    "My name is Mia and my number is [PHONE]. {Q}?", "I am a customer with account [IBAN]. {Q}?", "My card is [CARD]. {Q}?",
    "Hello, this is {person}. {Q}?", "Dear team, {q}? Regards, {person}", "{Q}? Thank you.", "I would like to know: {q}?",
    "Quick question, {q}?", "Good afternoon. {Q}?", "Sorry to bother you, {q}?", "{Q}? Thanks, {person}",
    "Please tell me: {q}?", "Hi, my email is [EMAIL]. {Q}?",
)  # fmt: skip
_SYSTEMS = (
    "You are the support desk of Acme Bank.", "You are the front desk of Globex Health.", "You are a helpful assistant.", "Answer briefly.",
    "Answer the customer's question.",
)  # fmt: skip
PEOPLE = (
    "Mia", "Otto", "Lena", "Paul", "Nora", "Emil", "Clara", "Jonas", "Ida", "Theo", "Ella", "Max", "Rosa", "Finn", "Anna", "Luca",
    "Sara", "Noah", "Julia", "Leo",
)  # fmt: skip
_CONSONANTS, _VOWELS = "bdfgjklmnprstvwz", "aeiou"

_REPEAT = ("Repeat: {}", "Say this again: {}", "{} Repeat that.", "Write the same words: {}", "Copy this: {}")

# --- complaints: product, problem, since when, wish ---

PRODUCTS = (
    "card", "transfer", "loan", "app", "account", "appointment", "invoice", "prescription", "payment", "statement", "referral",
    "vaccination", "mortgage", "password", "parking ticket", "blood test", "report", "contract", "deposit box", "room", "insurance card",
    "letter",
)  # fmt: skip
PROBLEMS = (
    "is missing",
    "is wrong",
    "was sent to somebody else",
    "is blocked",
    "was changed without asking",
    "has not arrived",
    "shows a wrong date",
    "was forgotten",
    "is not readable",
    "was charged twice",
    "does not work",
    "was delayed",
    "was refused",
    "was lost",
    "is too expensive",
    "was cancelled",
)
SINCES = (
    "Monday", "last week", "two weeks ago", "yesterday", "March", "the weekend", "Tuesday", "this morning", "last month", "June", "Friday",
    "three days ago", "October", "the holidays", "last year", "Easter", "Sunday",
)  # fmt: skip
WISHES = (
    "a refund", "an apology", "a new one", "a call back", "a written answer", "a quick solution", "an explanation", "my money back",
    "a second opinion", "an appointment", "a correction", "a discount", "a visit", "a free copy", "another adviser", "a better service",
)  # fmt: skip
# A complaint is an opening, a statement, something on the side and a wish, each from its own table.
_OPENINGS = (
    "",
    "",
    "Dear Sir or Madam, ",
    "Good day. ",
    "I need to tell you something. ",
    "It is {person} again. ",
    "This is the second time that I write. ",
    "Hello team, ",
    "I do not know what to do. ",
    "As a customer of many years I am surprised. ",
    "Please read this. ",
    "Good evening, {person} speaking. ",
    "Nothing works here. ",
    "My sister {person} writes for me. ",
    "What is going on? ",
    "I am sorry to write this. ",
    "You will not like this. ",
    "Dear team, ",
    "Hello, this is {person}. ",
    "I am very unhappy. ",
    "I have a complaint. ",
    "Good morning, ",
    "{person} here. ",
    "To whom it may concern: ",
    "I am angry. ",
    "Hi, ",
    "This cannot be true. ",
    "Dear support, my name is {person}. ",
    "Listen. ",
    "I want to complain. ",
    "Hello. ",
    "I am writing to you because I am disappointed. ",
)
_STATEMENTS = (
    "First of all, my {product} {problem}. It happened {since}.",
    "It was {since}. My {product} {problem}.",
    "I see that my {product} {problem}, and I see it since {since}.",
    "Why is it that my {product} {problem} since {since}?",
    "There is trouble with my {product}: it {problem}, as I found {since}.",
    "It {problem}, my {product}, and since {since} nothing happened.",
    "Since {since} nothing is right. My {product} {problem}.",
    "You told me about my {product}. It {problem} since {since}!",
    "The story of my {product} began {since}. Now it {problem}.",
    "What about my {product}? Since {since} it {problem}.",
    "Somebody must look at my {product}. It {problem} since {since}.",
    "My {product} {problem}. I wrote about it {since}.",
    "Believe me, my {product} {problem} since {since}.",
    "Since {since}, and I am sure of it, my {product} {problem}.",
    "When I looked {since}, I saw that my {product} {problem}.",
    "The {product} {problem}, and this since {since}.",
    "With my {product} it is like this: it {problem} since {since}.",
    "My husband saw {since} that my {product} {problem}.",
    "My {product} {problem}, since {since}.",
    "Since {since} my {product} {problem}.",
    "My {product} {problem}. I noticed it {since}.",
    "It is about my {product}, which {problem} since {since}.",
    "Since {since} I have the problem that my {product} {problem}.",
    "The problem is my {product}. It {problem}, and that since {since}.",
    "My {product} {problem} and it has been so since {since}.",
    "I write about my {product}. Since {since} it {problem}.",
    "You know my {product}. It {problem}. This began {since}.",
    "My {product}, since {since}, {problem}.",
    "For a while, since {since}, my {product} {problem}.",
    "About my {product}: it {problem} since {since}.",
    "My {product} {problem}. It has been like this since {since}.",
    "I have to say that my {product} {problem} since {since}.",
)
_ASIDES = (
    "",
    "",
    " {person} told me to write.",
    " The telephone rang for an hour.",
    " I have been a customer for ten years.",
    " My neighbour {person} had the same.",
    " I cannot sleep.",
    " It costs me a lot of time.",
    " The app says nothing about it.",
    " {person} said it would be quick.",
    " I do not understand why.",
    " You promised something else.",
    " Nobody told me anything.",
    " I stood in line for an hour.",
    " Other companies do this better.",
    " I sent two letters.",
    " I called twice and nobody helped.",
    " This is not acceptable.",
    " {person} at the desk could not help.",
    " I am tired of it.",
    " Nobody answers my letters.",
    " I asked for help and got none.",
    " I have waited long enough.",
    " My family is upset as well.",
    " I was told to be patient.",
)
_DEMANDS = (
    " What I want is {wish}.",
    " All I ask for is {wish}.",
    " I wait for {wish}.",
    " Let me have {wish}.",
    " Can I get {wish}?",
    " I am owed {wish}.",
    " Only {wish} will help.",
    " Send me {wish}. {person}",
    " I think I should get {wish}.",
    " Now I want {wish}, and soon.",
    " It is time for {wish}.",
    " So please, {wish}.",
    " My wish is {wish}.",
    " I count on {wish}. Regards, {person}",
    " In my eyes {wish} would be fair.",
    " You owe me {wish}.",
    " With {wish} I would be content.",
    " I want {wish}.",
    " I expect {wish}.",
    " Please give me {wish}.",
    " I ask for {wish}.",
    " I demand {wish}.",
    " I would like {wish}.",
    " Give me {wish}.",
    " I need {wish}.",
    " I hope for {wish}.",
    " I request {wish}. Regards, {person}",
    " Please arrange {wish}.",
    " I insist on {wish}. {person}",
)

_SUMMARISE = (
    "Summarise: {}", "{} Summarise this complaint.", "{} Please sum this up.", "Write a summary of this complaint: {}",
    "What does this customer complain about? {}", "{} What is the complaint?", "Make this complaint short: {}",
    "A customer wrote this. Sum it up: {}", "Please read this complaint and summarise it: {}", "Tell me in short what is wrong here: {}",
    "Complaint: {} Summary?", "This came by post today. Summarise it. {}", "In short, what does the letter say? {}",
    "Shorten this complaint, please. {}", "{} Give me the summary.", "We got this complaint: {} Please summarise it.",
    "Your task is to summarise a complaint: {}", "What does the writer want? {}", "Summarise the letter of this patient: {}",
    "I need a summary of the following: {}",
    "Summarise this complaint: {}", "Please summarise this complaint: {}", "Summarise the following complaint: {}",
    "Give me a summary of this complaint: {}", "What is this complaint about? {}", "Sum up this complaint: {}",
    "Here is a complaint. Summarise it: {}", "A summary of this complaint, please: {}", "Summarise what the customer says: {}",
    "Please give me a short summary of this complaint: {}",
)  # fmt: skip

# --- forms ---

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DOCTORS = ("Dr. Lee", "Dr. Weber", "Dr. Rossi", "Dr. Okafor", "Dr. Silva")
_LEADS = (
    "",
    "One more: ",
    "Here is a booking. ",
    "From the telephone: ",
    "This came in today. ",
    "Next one. ",
    "By e-mail: ",
    "Hi, ",
    "Attention: ",
    "We were told that ",
    "",
    "Please note: ",
    "Hello. ",
    "For the calendar: ",
    "Good morning. ",
    "As discussed, ",
    "To be booked: ",
    "Dear desk, ",
    "Note that ",
    "New appointment. ",
    "Kindly enter this: ",
)
_BOOKINGS = (
    "the patient is {person}, the doctor is {doctor}, the day is {day} and the time is {time}.",
    "{doctor}, {time}, {day}, {person}.",
    "on {day} {doctor} is there for {person}, from {time}.",
    "{person} called. {day} is fine, {time} too, and it must be {doctor}.",
    "I would like to come on {day}, say {time}, to see {doctor}. {person}",
    "tell {doctor} that {person} arrives at {time} on {day}.",
    "at {time}, {person}. On {day}, {doctor}.",
    "{doctor} wants to talk to {person} on {day}, at {time} sharp.",
    "is {time} on {day} possible for {person}? The doctor is {doctor}.",
    "{person} is a patient of {doctor} and comes {day}, {time}.",
    "the next free time of {doctor} is {day}, {time}, and {person} takes it.",
    "reserve {time} on {day} for {person}, please. It is about {doctor}.",
    "{day} is the day, {time} the time, {person} the patient and {doctor} the doctor.",
    "my son {person} has to see {doctor}. We come at {time} on {day}.",
    "{person} moved from another time to {day}, {time}, still with {doctor}.",
    "after lunch at {time} on {day}, {doctor} visits {person}.",
    "{doctor} on {day}: {person}, {time}.",
    "write down {person} at {time} for {day}, {doctor}.",
    "I spoke with {doctor}. {person} may come at {time} this {day}.",
    "from {time} on {day} {person} is in the room of {doctor}.",
    "{person} would like to see {doctor} on {day} at {time}.",
    "please book {person} with {doctor} for {day}, {time}.",
    "{doctor} will see {person} on {day} at {time}.",
    "on {day} at {time}, {person} comes to {doctor}.",
    "I am {person} and need {doctor} at {time} on {day}.",
    "{person} has an appointment with {doctor} on {day} at {time}.",
    "could {doctor} see {person} at {time} on {day}?",
    "{person}, {day}, {time}, {doctor}.",
    "at {time} on {day} {doctor} meets {person}.",
    "{day} {time}: {person} with {doctor}.",
    "{doctor} expects {person} at {time}, {day}.",
    "my name is {person}, I will come on {day} at {time} to {doctor}.",
    "{person} wants {day} at {time} with {doctor}.",
    "put {person} down for {doctor}, {day}, {time}.",
    "the visit of {person} to {doctor} is on {day} at {time}.",
    "this is {person}. Is {doctor} free on {day} at {time}?",
    "{doctor} has {person} at {time} on {day}.",
    "{time} on {day} is the time for {person} and {doctor}.",
    "we have {person} for {doctor} on {day}, at {time}.",
    "see you on {day} at {time}, {person}. Your doctor is {doctor}.",
    "{person} goes to {doctor} at {time} on {day}.",
    "with {doctor} on {day}, {person} at {time}.",
    "I, {person}, ask for {doctor} on {day} at {time}.",
    "{day}, {doctor}, {person}, {time}.",
    "please let {person} see {doctor} on {day} at {time}.",
    "{person} comes to {doctor} on {day} at {time}.",
    "can {person} come to {doctor} at {time} on {day}?",
    "book {doctor} for {person} on {day} at {time}.",
    "{person} asks for {doctor} at {time}, on {day}.",
    "{doctor} and {person} meet on {day} at {time}.",
)
_AS_JSON = (
    "JSON, fields name, doctor, day, time: {}", "{} Put name, doctor, day and time into JSON.",
    "Make JSON of this, with name, doctor, day and time: {}", "Read this and answer with JSON (name, doctor, day, time): {}",
    "{} Now the same as JSON with name, doctor, day, time.", "Answer only with JSON: name, doctor, day, time. {}",
    "Find name, doctor, day and time. Use JSON. {}", "For our calendar, as JSON with name, doctor, day, time: {}",
    "{} Which name, doctor, day and time? JSON, please.", "Text: {} Fields: name, doctor, day, time. Format: JSON.",
    "Convert to JSON with the fields name, doctor, day, time: {}", "The fields are name, doctor, day, time. Give JSON for: {}",
    "{} As JSON please: name, doctor, day, time.", "Output JSON with name, doctor, day and time for this booking: {}",
    "Name, doctor, day, time, as JSON, from this text: {}",
    "Answer as JSON with the fields name, doctor, day, time: {}", "Give me JSON with name, doctor, day and time: {}",
    "Extract name, doctor, day and time as JSON: {}", "Return the fields name, doctor, day, time as JSON. {}",
    "As JSON with name, doctor, day and time, please: {}", "{} Answer as JSON with the fields name, doctor, day, time.",
    "Write JSON with the fields name, doctor, day, time. {}", "Please turn this into JSON with name, doctor, day and time: {}",
    "{} Give me that as JSON with name, doctor, day, time.", "JSON with the fields name, doctor, day, time: {}",
    "Fill the fields name, doctor, day, time and answer as JSON. {}", "What are name, doctor, day and time here? Answer as JSON. {}",
    "I need JSON with name, doctor, day, time for this: {}", "Write this as JSON with the fields name, doctor, day, time: {}",
    "{} Please extract name, doctor, day and time as JSON.",
)  # fmt: skip


def split(wordings: Sequence[str], *, held: bool) -> Sequence[str]:
    """Return the part of a table that is held out, or the part that is trained on."""
    kept = len(wordings) - max(1, len(wordings) // HELD_OUT_SHARE)
    return wordings[kept:] if held else wordings[:kept]


def training_dialogue(rng: random.Random) -> Dialogue:
    """Draw a dialogue none of whose wordings is held out."""
    return _in_context(rng, _draw(rng, held=False))


def _in_context(rng: random.Random, single: Dialogue) -> Dialogue:
    """Put it behind a system message or an earlier turn, sometimes."""
    messages = list(single.messages)
    if rng.random() < 0.15:
        earlier = _draw(rng, held=False)
        messages = [*earlier.messages, {"role": "assistant", "content": earlier.answer}, *messages]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEMS)})
    return Dialogue(single.group, tuple(messages), single.answer)


def held_out_dialogues(seed: int, each: int) -> Iterator[Dialogue]:
    """Yield dialogues of every group in held-out wordings, `each` of every group, no question twice."""
    rng = random.Random(f"held out/{seed}")
    for group in (group for group in Group if group is not Group.REPEAT):
        seen: set[str] = set()
        for _ in range(each * 50):
            dialogue = _of_group(rng, group, held=True)
            question = dialogue.messages[-1]["content"]
            if question not in seen:
                seen.add(question)
                yield _in_context(rng, dialogue)
            if len(seen) == each:
                break


_WEIGHTS = {
    Group.FACT: 0.31,
    Group.LONG: 0.05,
    Group.COMPLAINT: 0.15,
    Group.FORM: 0.16,
    Group.SMALL_TALK: 0.07,
    Group.UNKNOWN: 0.16,
    Group.REPEAT: 0.1,
}


def _draw(rng: random.Random, *, held: bool) -> Dialogue:
    group = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    return _of_group(rng, group, held=held)


def _of_group(rng: random.Random, group: Group, *, held: bool) -> Dialogue:
    if group is Group.FACT:
        question, answer = _fact(rng, held) if rng.random() < 0.85 else _choice(rng, REQUESTS, held)
    elif group is Group.LONG:
        question, answer = _choice(rng, EXPLANATIONS, held)
    elif group is Group.SMALL_TALK:
        question, answer = _choice(rng, SMALL_TALK, held, plain=True)
    elif group is Group.COMPLAINT:
        question, answer = _complaint(rng, held)
    elif group is Group.FORM:
        question, answer = _form(rng, held)
    elif group is Group.REPEAT:
        question, answer = _repetition(rng)
    else:
        question, answer = _outside(rng, held), UNKNOWN
    return Dialogue(group, ({"role": "user", "content": question},), answer)


def _fact(rng: random.Random, held: bool) -> tuple[str, str]:
    fact = rng.choice(FACTS)
    frame = rng.choice(split(FRAMES[fact.aspect], held=held))
    return _wrap(rng, frame.format(rng.choice(fact.names)), held), fact.answer


def _choice(
    rng: random.Random, choices: tuple[tuple[tuple[str, ...], str], ...], held: bool, *, plain: bool = False
) -> tuple[str, str]:
    wordings, answer = rng.choice(choices)
    wording = rng.choice(split(wordings, held=held))
    return (_punctuate(rng, wording) if plain else _wrap(rng, wording, held)), answer


def _outside(rng: random.Random, held: bool) -> str:
    frame, subject = rng.choice(split(_OUTSIDE, held=held)), rng.choice(split(_SUBJECTS, held=held))
    if not held and rng.random() < 0.3:
        subject = _made_up(rng)
    return _wrap(rng, frame.format(subject), held)


def _complaint(rng: random.Random, held: bool) -> tuple[str, str]:
    slots = {
        "product": rng.choice(PRODUCTS),
        "problem": rng.choice(PROBLEMS),
        "since": rng.choice(SINCES),
        "wish": rng.choice(WISHES),
    }
    pieces = [rng.choice(split(table, held=held)) for table in (_OPENINGS, _STATEMENTS, _ASIDES, _DEMANDS)]
    text = "".join(pieces).format(person=_person(rng, held), **slots)
    answer = "The {product} {problem}, since {since}. The customer wants {wish}.".format(**slots)
    return rng.choice(split(_SUMMARISE, held=held)).format(text), answer


def _form(rng: random.Random, held: bool) -> tuple[str, str]:
    slots = {
        "person": _person(rng, held),
        "doctor": rng.choice(DOCTORS) if held or rng.random() < 0.5 else f"Dr. {_made_up(rng)}",
        "day": rng.choice(DAYS),
        "time": f"{rng.randrange(8, 19)}:{rng.randrange(0, 60, 5):02}",
    }
    booking = rng.choice(split(_BOOKINGS, held=held)).format(**slots)
    lead = rng.choice(split(_LEADS, held=held))
    booking = lead + booking if lead.endswith((", ", ": ", "that ")) else lead + booking[0].upper() + booking[1:]
    fields = {"name": slots["person"], "doctor": slots["doctor"], "day": slots["day"], "time": slots["time"]}
    return rng.choice(split(_AS_JSON, held=held)).format(booking), json.dumps(fields)


def _wrap(rng: random.Random, question: str, held: bool) -> str:
    capital = question[0].upper() + question[1:]
    wrapper = rng.choice(split(_WRAPPERS, held=held))
    return wrapper.format(q=question, Q=capital, person=_person(rng, held))


def _repetition(rng: random.Random) -> tuple[str, str]:
    said = " ".join(_made_up(rng) for _ in range(rng.randint(2, 12)))
    return rng.choice(_REPEAT).format(said), said


def _person(rng: random.Random, held: bool) -> str:
    """Return a name; in training half of the time one that nobody has: it is to be copied, not known."""
    return rng.choice(PEOPLE) if held or rng.random() < 0.5 else _made_up(rng)


def _made_up(rng: random.Random) -> str:
    name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    return (name + rng.choice(("", rng.choice(_CONSONANTS)))).capitalize()


def _punctuate(rng: random.Random, wording: str) -> str:
    text = wording if rng.random() < 0.3 else wording[0].upper() + wording[1:]
    return text + rng.choice(("", ".", "!", "?"))
