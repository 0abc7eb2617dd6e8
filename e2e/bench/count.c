/* A TCG plugin that counts what a guest executes, in a memfd named "guest-instructions": three numbers of 64 bits:
 * instructions, those of the guest's kernel among them, and translated blocks.
 *
 * It is also a program that executes QEMU (QEMU, a macro) with itself as a plugin. The jail of a VMM has one file for QEMU and
 * lets it create no others, so one file must be both.
 *
 * The declarations are the part of QEMU's plugin interface (version 1) that is used here; Debian has no header for it. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
enum { ADD_U64 = 0 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t value);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t *counters;

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
	uint64_t instructions = qemu_plugin_tb_n_insns(block);

	(void)id;
	qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &counters[0], instructions);
	if (qemu_plugin_tb_vaddr(block) >> 63)
		qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &counters[1], instructions);
	counters[2]++;
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
	/* Not closed: it is found among QEMU's descriptors. */
	int file = memfd_create("guest-instructions", MFD_CLOEXEC);

	(void)info;
	(void)argc;
	(void)argv;
	if (file < 0 || ftruncate(file, 4096) != 0)
		return 1;
	counters = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (counters == MAP_FAILED)
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}

/* The program interpreter, which a shared object has only if it is also a program. */
__attribute__((section(".interp"), used)) static const char interpreter[] = "/lib64/ld-linux-x86-64.so.2";

/* Entry point: passes the initial stack, with the arguments, to a function. */
__asm__(".globl start\n.hidden start\nstart:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall execute_qemu\n");

__attribute__((visibility("hidden"), noreturn, used)) void execute_qemu(char **stack)
{
	size_t argc = (size_t)stack[0];
	char *arguments[argc + 3];

	arguments[0] = QEMU;
	arguments[1] = "-plugin";
	arguments[2] = stack[1];
	for (size_t i = 1; i <= argc; i++)
		arguments[i + 2] = stack[i + 1];
	execv(QEMU, arguments);
	perror(QEMU);
	_exit(1);
}
