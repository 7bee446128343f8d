"""How well rollouts obey their commands, judged by what their pictures show."""
