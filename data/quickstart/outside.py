"""What people ask of the quickstart's model that none of its commands is for, and what it invented instead.

The invented answers are those of the model that `make quickstart` trains, generated greedily once for each request and
written down here: the answers that the pairs reject. Held-out requests stand in dpo-eval.jsonl only; a topic without
trained requests is held out as a whole. Many requests are near to a command on purpose ("Close the garage door",
"Remind me to call the dentist"): that is where an invented command does harm.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Requests of one kind: those training may use, each with the command that was invented for it; those held out."""

    name: str
    trained: tuple[tuple[str, str], ...]
    held_out: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        "doors and windows",
        (
            ("Open the window in the kitchen", '{"command":"set_temperature","room":"kitchen","degrees":-5}'),
            ("Close the garage door", '{"command":"set_temperature","room":"garage","degrees":-5}'),
            ("Open the curtains in the bedroom", '{"command":"set_temperature","room":"bedroom","degrees":-5}'),
            ("Shut all the windows", '{"command":"set_temperature","room":"windows","degrees":-1}'),
            ("Is the back door open?", '{"command":"add_item","item":"backdoor"}'),
            ("Leave the balcony door open", '{"command":"set_temperature","room":"land","degrees":-5}'),
            (
                "Pull down the blinds in the living room",
                '{"command":"set_temperature","room":"living room","degrees":-50}',
            ),
            ("Close the skylight, it is raining", '{"command":"set_temperature","room":"skylight","degrees":-5}'),
        ),
        ("Raise the shutters in the dining room", "Did I leave the gate open?"),
    ),
    Topic(
        "appliances",
        (
            ("Start the washing machine", '{"command":"set_temperature","room":"washing machine","degrees":-1}'),
            ("Run the dishwasher", '{"command":"set_temperature","room":"dishwasher","degrees":-5}'),
            ("Vacuum the living room", '{"command":"set_temperature","room":"living room","degrees":-10}'),
            ("Make me a cup of coffee", '{"command":"add_item","item":"coffee"}'),
            ("Is the oven still on?", '{"command":"set_temperature","room":"oven","degrees":-3}'),
            ("Turn on the fan", '{"command":"set_temperature","room":"furniture","degrees":-15}'),
            ("Switch off the television", '{"command":"lights_off","room":"television"}'),
            (
                "Empty the dryer in the laundry room",
                '{"command":"add_item","item":"drying dryer","room":"laundry room"}',
            ),
        ),
        ("Mop the hallway", "Preheat the oven"),
    ),
    Topic(
        "geography",
        (
            ("What is the capital of France?", '{"command":"add_item","item":"france"}'),
            ("How many people live in Berlin?", '{"command":"add_item","item":"Berlin"}'),
            ("Which river flows through Cairo?", '{"command":"add_item","item":"rivers","city":" Cairo"}'),
            ("Where is Mount Everest?", '{"command":"add_item","item":"mount Everest"}'),
            ("How far is the moon from the earth?", '{"command":"set_position","lat":"11.1","unit":"meters"}'),
            ("Name three countries in Africa", '{"command":"add_item","item":"Africa"}'),
            (
                "What language do they speak in Brazil?",
                '{"command":"send_message","name":"Emilia","text":"They speak in Portuguese"}',
            ),
            ("Is Iceland an island?", '{"command":"add_item","item":"Iceland"}'),
        ),
        ("Which ocean lies between Europe and America?", "Tell me the largest city in Japan"),
    ),
    Topic(
        "history",
        (
            (
                "Who wrote Hamlet?",
                '{"command":"send_message","name":"Hamlet","text":"Hamlet is a masterpiece of literature."}',
            ),
            (
                "When did the Second World War end?",
                '{"command":"send_message","name":"World War II","text":"the second world war ended"}',
            ),
            (
                "Who was the first person on the moon?",
                '{"command":"send_message","name":"John","text":"the moon is a place"}',
            ),
            ("Which king built Versailles?", '{"command":"add_item","item":"Vander-Lands","name":"King Louis XIV"}'),
            (
                "When was the telephone invented?",
                '{"command":"send_message","name":"John","text":"the telephone was invented in 1965"}',
            ),
            (
                "Who painted the Mona Lisa?",
                '{"command":"send_message","name":"Mona Lisa","text":"the painting of the lady"}',
            ),
            ("Tell me about the Roman Empire", '{"command":"send_message","name":"Emilia","text":"the roman empire"}'),
            ("What happened in 1969?", '{"command":"send_message","name":"John","text":"the ball was thrown"}'),
        ),
        ("Who discovered penicillin?", "In which year did the Titanic sink?"),
    ),
    Topic(
        "arithmetic",
        (
            ("What is 12 plus 7?", '{"command":"add_value","value":"12","label":"add"}'),
            ("Multiply 8 by 6", '{"command":"add_value","value":"8","label":"label"}'),
            ("Divide 144 by 12", '{"command":"add_value","value":"144","room":"room"}'),
            ("What is the square root of 81?", '{"command":"set_value","value":"81","unit":"square"}'),
            ("How many minutes are in a day?", '{"command":"set_timer","minutes":1,"label":"day"}'),
            ("Convert 10 miles to kilometers", '{"command":"set_temperature","room":"basement","degrees":10}'),
            ("Is 17 a prime number?", '{"command":"add_value","value":"17","name":"John"}'),
            ("Add up 3, 5 and 9", '{"command":"add_value","value":"3","minutes":5}'),
        ),
        ("Subtract 15 from 40", "How much is half of 250?"),
    ),
    Topic(
        "writing",
        (
            (
                "Write me a poem about the sea",
                '{"command":"write_to_file","file":"sea","genre":"ocean","minutes":3600}',
            ),
            (
                "Summarize this article for me",
                '{"command":"add_item","item":"summarize_this_article","name":"John",'
                '"text":"the article is summarizing my life"}',
            ),
            ("Correct the grammar of this sentence", '{"command":"add_item","item":"item"}'),
            (
                "Write a letter to my landlord",
                '{"command":"send_message","name":"my landlord","text":"the room is available"}',
            ),
            ("Give me a title for my essay", '{"command":"add_item","item":"title"}'),
            ("Tell me a bedtime story", '{"command":"set_timer","minutes":1,"label":"bedtime"}'),
            (
                "Draft a speech for the wedding",
                '{"command":"send_message","name":"John","text":"the wedding is in 5 days"}',
            ),
            (
                "Make up a name for a new product",
                '{"command":"add_item","item":"new product","name":"name_of_product"}',
            ),
        ),
        ("Compose a haiku about autumn", "Shorten this paragraph, please"),
    ),
    Topic(
        "languages",
        (
            (
                "Translate good morning into Spanish",
                '{"command":"set_temperature","room":"home","room":"morning","degrees":-3}',
            ),
            (
                "How do you say thank you in Japanese?",
                '{"command":"send_message","name":"Emma","text":"the gift is very appreciated"}',
            ),
            ("What does the word ubiquitous mean?", '{"command":"add_item","item":"ubiquitous"}'),
            ("How is necessary spelled?", '{"command":"add_item","item":"item"}'),
            ("Give me a synonym for happy", '{"command":"add_item","item":"happy"}'),
            ("What is the plural of mouse?", '{"command":"add_item","item":"mouse"}'),
            ("Say hello in Italian", '{"command":"send_message","name":"John","text":"hello"}'),
            ("Which words rhyme with moon?", '{"command":"add_item","item":"moon","words":"hmm"}'),
        ),
        ("What is the German word for bread?", "Define the word nostalgia"),
    ),
    Topic(
        "travel",
        (
            ("Book a table for two", '{"command":"add_item","item":"book","room":"table"}'),
            ("Call a taxi to the airport", '{"command":"add_item","item":"taxis","room":"airport"}'),
            (
                "When does the next bus leave?",
                '{"command":"send_message","name":"John","text":"the next bus is going to be at 1pm"}',
            ),
            ("Find me a cheap flight to London", '{"command":"add_item","item":"flight_to_london","city":"London"}'),
            ("How do I get to the station?", '{"command":"send_message","name":"John","text":"to the station"}'),
            ("Reserve a hotel room for Friday", '{"command":"add_item","item":"reserve_hotel room","date":"Friday"}'),
            ("Is there a pharmacy nearby?", '{"command":"add_item","item":"pharmacy"}'),
            ("How long is the drive to Boston?", '{"command":"set_timer","minutes":1,"label":"Boston"}'),
        ),
        ("Rent a car for the weekend", "Buy two train tickets to Rome"),
    ),
    Topic(
        "weather",
        (
            ("What is the weather like tomorrow?", '{"command":"set_temperature","room":"basement","degrees":-15}'),
            ("Will it rain today?", '{"command":"add_item","item":"water"}'),
            ("How cold is it outside?", '{"command":"set_temperature","room":"outdoor","degrees":-15}'),
            ("Do I need an umbrella?", '{"command":"add_item","item":"umbrella"}'),
            ("When does the sun set?", '{"command":"set_timer","minutes":1,"label":"sunset"}'),
            ("Is a storm coming?", '{"command":"add_item","item":"storm"}'),
            ("How windy is it at the beach?", '{"command":"set_temperature","room":"beach","degrees":-15}'),
            ("What was the hottest day this year?", '{"command":"set_temperature","room":"home","degrees":30}'),
        ),
        ("Give me the forecast for the weekend", "Is it going to snow tonight?"),
    ),
    Topic(
        "small talk",
        (
            ("How are you today?", '{"command":"send_message","name":"John","text":"you are today"}'),
            ("Tell me a joke", '{"command":"send_message","name":"John","text":"the room is filled with laughter"}'),
            (
                "Thank you very much",
                '{"command":"send_message","name":"John","text":"the room is decorated with all the best colors"}',
            ),
            ("Hello", '{"command":"send_message","name":"Hello","text":"the room"}'),
            ("What is your name?", '{"command":"send_message","name":"John","text":"you are welcome"}'),
            ("Do you like music?", '{"command":"play_music","genre":"rock","room":"living room"}'),
            ("Good night", '{"command":"set_timer","minutes":1,"label":"night"}'),
            ("I am bored", '{"command":"add_item","item":"item"}'),
        ),
        ("Are you a robot?", "You did a great job"),
    ),
    Topic(
        "calendar",
        (
            (
                "What is on my calendar today?",
                '{"command":"send_message","name":"John","text":"I am on my calendar today"}',
            ),
            ("What time is it?", '{"command":"set_timer","minutes":1,"label":"time"}'),
            (
                "Cancel my appointment on Monday",
                '{"command":"send_message","name":"John","text":"I am canceling my appointment on Monday"}',
            ),
            ("Wake me up at seven", '{"command":"set_timer","minutes":7,"label":"wake_up"}'),
            ("What day is tomorrow?", '{"command":"set_date","year":"tom","day":"tom"}'),
            (
                "Schedule a meeting for Thursday",
                '{"command":"send_message","name":"John","text":"the meeting is scheduled for Thursday"}',
            ),
            (
                "When is my next appointment?",
                '{"command":"send_message","name":"John","text":"my appointment is tomorrow"}',
            ),
            (
                "Remind me to call the dentist",
                '{"command":"send_message","name":"Reminder","text":"the dentist is here"}',
            ),
        ),
        ("Move the lunch to next Tuesday", "How many days until Christmas?"),
    ),
    Topic(
        "science",
        (
            ("Why is the sky blue?", '{"command":"set_temperature","room":"sky","degrees":90}'),
            ("How does a battery work?", '{"command":"set_temperature","room":"basement","degrees":-5}'),
            ("What are atoms made of?", '{"command":"add_item","item":"atoms"}'),
            ("How fast does light travel?", '{"command":"set_timer","minutes":1,"label":"light"}'),
            ("Why do leaves turn red?", '{"command":"set_temperature","room":"landscape","degrees":25}'),
            (
                "What is a black hole?",
                '{"command":"send_message","name":"John","text":"the black hole is incredibly powerful"}',
            ),
            ("How do vaccines work?", '{"command":"send_message","name":"John","text":"the vaccine is effective"}'),
            ("What causes an earthquake?", '{"command":"send_message","name":"John","text":"the earth is shaking"}'),
        ),
        ("Why does ice float on water?", "Explain photosynthesis to a child"),
    ),
    Topic(
        "locks and cameras",
        (),
        ("Lock the front door", "Show me the garage camera", "Arm the alarm system", "Who rang the doorbell?"),
    ),
    Topic(
        "cooking",
        (),
        (
            "How do I make pancakes?",
            "What can I cook with chicken?",
            "How long should I boil an egg?",
            "Is this milk still good?",
        ),
    ),
    Topic(
        "animals",
        (),
        ("How long do elephants live?", "Do penguins have knees?", "What do pandas eat?", "Which bird is the fastest?"),
    ),
    Topic(
        "programming",
        (),
        ("Sort this list in Python", "Fix the bug in my program", "What is a hash table?", "Explain recursion to me"),
    ),
    Topic(
        "money",
        (),
        (
            "How much is a new car?",
            "Transfer 50 dollars to my landlord",
            "What is my account balance?",
            "Should I buy gold now?",
        ),
    ),
    Topic(
        "sport",
        (),
        (
            "Who won the match last night?",
            "How many players are in a football team?",
            "Teach me how to swim",
            "What is the world record in the marathon?",
        ),
    ),
)
