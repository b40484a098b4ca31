"""The built-in corpus: unlimited short stories, conversations about them, and questions with known answers.

Every story is told by a seeded teller that knows the exact probability of its text, so that the loss of a perfect
model is known. A story depends on (seed, index, split) alone. In the train split about one pair in ten of hero's kind
and thing never meets; every story of the held-out split is about one of those pairs.

`script` describes the language of the plots, `template` that of a sentence, `scoring` finds a text's probability.
"""

from slmkit.data.stories.pairs import question_pair
from slmkit.data.stories.primer import primer_texts
from slmkit.data.stories.questions import Question
from slmkit.data.stories.story import Story, tell, tell_many
from slmkit.data.stories.talk import conversation, held_out_questions, held_out_scene
from slmkit.data.stories.words import SPLITS

__all__ = [
    "SPLITS",
    "Question",
    "Story",
    "conversation",
    "held_out_questions",
    "held_out_scene",
    "primer_texts",
    "question_pair",
    "tell",
    "tell_many",
]
