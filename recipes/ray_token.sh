# `ray start` asks for a token where ~/.ray/auth_token lies, which any run on this machine has made; a program that joins
# the cluster has to be told that it does. The same file belongs on every node. RAY_AUTH_MODE=disabled asks for none.
if [[ -z ${RAY_AUTH_MODE:-} && -f ${HOME:-}/.ray/auth_token ]]; then
    export RAY_AUTH_MODE=token
fi
