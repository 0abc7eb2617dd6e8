/*
 * /bin/sh of the images of Kubernetes' test suite: busybox's ash, or bash if a variable of the environment has a name that
 * ash drops, such as data-1. The suite expects both such variables and the texts of ash's errors.
 */
#include <ctype.h>
#include <stdio.h>
#include <unistd.h>

extern char **environ;

static int is_identifier(const char *variable)
{
	if (!isalpha((unsigned char)*variable) && *variable != '_')
		return 0;
	while (isalnum((unsigned char)*variable) || *variable == '_')
		variable++;
	return *variable == '=';
}

int main(int argc, char **argv)
{
	const char *shell = "/bin/busybox";

	(void)argc;
	for (char **variable = environ; *variable; variable++)
		if (!is_identifier(*variable))
			shell = "/bin/bash";
	execv(shell, argv);
	perror(shell);
	return 127;
}
