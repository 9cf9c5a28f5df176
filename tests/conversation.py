"""A conversation about four things, and questions about them."""

_SAID = """
Ann|I planted tomatoes and basil in the raised bed behind the shed.
Bob|Did the tomatoes survive the frost last week?
Ann|Most did, but I lost two basil plants to the slugs.
Bob|Crushed egg shells around the stems keep slugs away.
Ann|We booked a flight to Lisbon for the ninth of May.
Bob|Which airline are you flying with?
Ann|With TAP, and we stay in a hotel in Alfama called Memmo.
Bob|Take tram 28 up the hill, it is lovely.
Bob|My laptop crashed while compiling the kernel last night.
Ann|Was it the memory or the disk?
Bob|The disk, a failing solid state drive from Kingston.
Ann|Restore the backup and replace the drive.
Bob|My daughter started cello lessons with Mrs Okafor.
Ann|How often does she practise?
Bob|Half an hour each evening, she plays a Bach minuet.
Ann|The school concert is in December, is she playing?
Ann|I also bought a rose bush called Gertrude Jekyll.
Bob|Roses need pruning in late winter.
Ann|The compost heap smells, I should turn it.
Bob|Add dry leaves and it will be fine.
Ann|We want to visit Sintra by train as well.
Bob|The palace tickets sell out early, book ahead.
Ann|Our luggage allowance is only one bag each.
Bob|Pack light, the weather is warm in May.
Bob|I ordered a new drive with two terabytes.
Ann|Install Linux again and copy your home folder.
Bob|The graphics driver needs version 550.
Ann|Check the checksum of the installer first.
Bob|Yes, the orchestra rehearses on Tuesdays.
Ann|I used to play the viola in a string quartet.
Bob|Then you two could play duets.
Ann|I would have to buy new strings for the bow and viola.
"""
CONVERSATION = [tuple(line.split("|")) for line in _SAID.strip().splitlines()]
TOPICS = ["garden", "travel", "computer", "music"]  # of the windows of four, in turn
QUESTIONS = [
    ("What did the slugs destroy in the garden?", "Two basil plants", "garden"),
    ("Which rose bush did Ann buy?", "Gertrude Jekyll", "garden"),
    ("When do they fly to Lisbon?", "The ninth of May", "travel"),
    ("What is the hotel in Alfama called?", "Memmo", "travel"),
    ("Which company made the failing drive of the laptop?", "Kingston", "computer"),
    ("How big is the new drive of the laptop?", "Two terabytes", "computer"),
    ("Who gives the daughter cello lessons?", "Mrs Okafor", "music"),
    ("On which day does the orchestra rehearse?", "Tuesdays", "music"),
]
