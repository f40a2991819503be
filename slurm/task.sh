#!/bin/bash
# One task of a job: run the command and leave word of a user error. srun reports the highest exit code of its tasks,
# and a rank that it kills because another one exited with 2 has a higher one.

# Until Python has its own handlers, a signal must not end the rank.
trap '' USR1 USR2 TERM
"$@"
code=$?
[ $code = 2 ] && touch "$USER_ERROR_MARK"
exit $code
